"""What is measured of each layer: its capacities, and the formats that it stores them in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from xkv_fx.errors import BudgetError
from xkv_fx.formats import LayerFormats, checked_pair
from xkv_fx.layers import LayerSpec
from xkv_fx.planning.data.grid import check_grid, check_storable

GRID = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
# With formats there is a grid for each pair of them, so it is coarser. A layer that holds few tokens strays by what is
# missing and hardly by how it is stored, so only the pair of the fewest bytes is measured down to few; and half of the
# tokens in the model's dtype take the bytes of nearly all in int8, which is better.
_FEWEST_BYTES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
_OTHERS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
_MODEL = (3 / 4,)

# Heads are measured at fewer points, so that all of a layer's cost about half as much again as the layer.
_OF_HEADS: dict[int, tuple[float, ...]] = {
    1: GRID,
    2: (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4),
    3: (1 / 32, 1 / 8, 3 / 8, 3 / 4),
    4: (1 / 16, 1 / 4, 5 / 8),
}
_OF_MORE_HEADS = (1 / 8, 1 / 2)
_FEWEST_BYTES_OF_HEADS = (1 / 16, 1 / 4)
_OTHERS_OF_HEADS = (1 / 8, 1 / 2)
_OTHERS_OF_MORE_HEADS = (1 / 4,)
_FEW_HEADS = 3


@dataclasses.dataclass(frozen=True)
class Points:
    """What each layer is measured at, all others full.

    Attributes:
        shares: of the tokens that a layer can hold, above 0; 1 where nothing is evicted.
        formats: of keys and values at each of them, None for the model's dtype; None as a whole where all are in that.
    """

    shares: tuple[float, ...]
    formats: tuple[LayerFormats | None, ...] | None = None

    def __iter__(self) -> Iterator[tuple[float, LayerFormats | None]]:
        return iter(zip(self.shares, self.formats or (None,) * len(self.shares), strict=True))

    def __len__(self) -> int:
        return len(self.shares)


def pairs_to_measure(
    formats: Sequence[str | LayerFormats] | None, layers: Sequence[LayerSpec] = ()
) -> tuple[LayerFormats | None, ...]:
    """The formats of keys and values that are measured when these are asked for, None for the model's dtype.

    Args:
        formats: names, each for keys and values alike, or pairs of names. `"int8"` and `"int4"` together add int8 keys
            with int4 values: keys need the bits, values do not. Latents are both, and are not measured so.
        layers: that will be measured.

    Raises:
        BudgetError: none, an unknown one, or something else than names and pairs.
    """
    if formats is None:
        return (None,)
    if isinstance(formats, str) or not isinstance(formats, Sequence) or not formats:
        raise BudgetError(f"formats must be a sequence of names or pairs of names, at least one; got {formats!r:.100}")
    pairs = [checked_pair((one, one) if isinstance(one, str) else one, "what is measured") for one in formats]
    if "int8" in formats and "int4" in formats and all(spec.value_dim for spec in layers):
        pairs.append(("int8", "int4"))
    return tuple(dict.fromkeys(pairs))


def points_to_measure(
    pairs: Sequence[LayerFormats | None], grid: Sequence[float] | None, layers: Sequence[LayerSpec], by: str = "layer"
) -> Points:
    """Where to measure layers, or their KV heads, in these formats.

    Args:
        pairs: as `pairs_to_measure` gives them.
        grid: ascending shares for each of them, above 0 and below 1; chosen by their bytes when None.
        by: `"layer"` or `"head"`; a head is measured at fewer points, by how many heads there are in a layer.

    Raises:
        BudgetError: a grid out of range, or a layer that cannot be stored so.
    """
    check_storable(pairs, layers)
    heads = max(spec.kv_heads for spec in layers) if by == "head" else 1
    if list(pairs) == [None]:
        return Points(check_grid(_OF_HEADS.get(heads, _OF_MORE_HEADS) if grid is None else grid))
    fewest: tuple[float, ...] = _FEWEST_BYTES
    others: tuple[float, ...] = _OTHERS
    if heads > 1:
        fewest = _FEWEST_BYTES_OF_HEADS
        others = _OTHERS_OF_HEADS if heads <= _FEW_HEADS else _OTHERS_OF_MORE_HEADS
    by_bytes = sorted(pairs, key=lambda pair: -sum(spec.slot_bytes(formats=pair) for spec in layers))
    shares: list[float] = []
    formats: list[LayerFormats | None] = []
    for pair in by_bytes:
        chosen = fewest if pair == by_bytes[-1] else _MODEL if pair is None else others
        measured = chosen if grid is None else check_grid(grid)
        if pair is not None:  # in the model's dtype, all tokens are the full cache, which strays by nothing
            measured += (1.0,)
        shares += measured
        formats += [pair] * len(measured)
    return Points(tuple(shares), tuple(formats))


def cost_by_head(pairs: Sequence[LayerFormats | None], layers: Sequence[LayerSpec]) -> float:
    """How often the continuation of a prompt is run again to measure heads, over how often it is to measure layers."""
    of_head, of_layer = (len(points_to_measure(pairs, None, layers, by)) for by in ("head", "layer"))
    return of_head * sum(spec.kv_heads for spec in layers) / (of_layer * len(layers))
