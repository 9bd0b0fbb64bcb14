"""The grid of a calibration: at which shares of its tokens, and in which formats, each layer is measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from xkv_fx.errors import BudgetError
from xkv_fx.formats import LayerFormats, checked_pair, pair_name
from xkv_fx.layers import LayerSpec


def check_grid(grid: Any) -> tuple[float, ...]:
    """A grid of capacities as floats.

    Raises:
        BudgetError: not ascending shares above 0 and below 1, or fewer than two.
    """
    shares = _floats(grid)
    if len(shares) < 2 or not _ascending(shares):
        raise BudgetError(
            f"grid must be at least two ascending shares of the prompt's tokens, above 0 and below 1; got {shares}"
        )
    return shares


def _ascending(shares: Sequence[float]) -> bool:
    """Whether they are ascending shares above 0 and below 1."""
    rising = all(low < high for low, high in itertools.pairwise(shares))
    return rising and shares[0] > 0 and shares[-1] < 1


def _floats(grid: Any) -> tuple[float, ...]:
    try:
        return tuple(map(float, grid))
    except (TypeError, ValueError) as error:
        raise BudgetError(f"grid must be shares of the prompt's tokens; got {grid!r:.200}") from error


def check_storable(pairs: Sequence[LayerFormats | None], layers: Sequence[LayerSpec]) -> None:
    """Refuse formats that not all layers can be stored in.

    Raises:
        BudgetError: there are such; the message names the layer.
    """
    for pair in dict.fromkeys(pairs):
        for layer, spec in enumerate(layers):
            try:
                spec.slot_bytes(formats=pair)
            except BudgetError as error:
                raise BudgetError(f"layer {layer} cannot be stored as {pair_name(pair)}: {error}") from error


def can_store(layers: Sequence[LayerSpec], pair: LayerFormats | None) -> bool:
    """Whether all layers can be stored in these formats."""
    try:
        check_storable((pair,), layers)
    except BudgetError:
        return False
    return True


def checked_points(grid: Any, formats: Any) -> tuple[tuple[float, ...], tuple[LayerFormats | None, ...] | None]:
    """Shares and formats of what was measured, in their one normal form.

    Raises:
        BudgetError: not a grid for each pair of formats, ending with all tokens in all but the model's dtype.
    """
    if formats is None:
        return check_grid(grid), None
    shares = _floats(grid)
    if isinstance(formats, str) or not isinstance(formats, Sequence) or len(formats) != len(shares):
        raise BudgetError(f"formats must be {len(shares)} pairs, one for each point of the grid; got {formats!r:.100}")
    pairs = tuple(checked_pair(pair, f"point {point}") for point, pair in enumerate(formats))
    if not any(pairs):
        return check_grid(shares), None
    for pair in dict.fromkeys(pairs):
        of_pair = [share for share, measured in zip(shares, pairs, strict=True) if measured == pair]
        if pair is not None and of_pair.pop() != 1:
            raise BudgetError(f"the last point in {pair_name(pair)} must be 1, all tokens; got {shares}")
        if not of_pair or not _ascending(of_pair):
            raise BudgetError(
                f"the points in {pair_name(pair)} must be ascending shares of the prompt's tokens, above 0 and below "
                f"1; got {of_pair}"
            )
    return shares, pairs
