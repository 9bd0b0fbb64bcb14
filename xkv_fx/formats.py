"""How slots store keys and values: the names of formats, and a pair of them for each layer.

Like the plan, this needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeGuard, get_args

from xkv_fx.errors import BudgetError

SlotFormat = Literal["model", "fp8", "int8", "int4"]
"""`"model"` is the model's own dtype."""
SLOT_FORMATS: tuple[str, ...] = get_args(SlotFormat)

LayerFormats = tuple[SlotFormat, SlotFormat]
"""Of a layer's keys, and of its values."""

_IN_MODEL: LayerFormats = ("model", "model")


def checked_formats(formats: Any, layers: int) -> tuple[LayerFormats | None, ...] | None:
    """The formats of a plan in their one normal form, so that plans which store alike are equal.

    Args:
        formats: None, or for each layer None or a pair of names, of its keys and of its values.
        layers: how many there are.

    Returns:
        for each layer its pair, or None where both are `"model"`; None where that is so in every layer.

    Raises:
        BudgetError: another number of layers, something else than a pair, or an unknown name.
    """
    if formats is None:
        return None
    if not _is_sequence(formats):
        raise BudgetError(
            f"formats must be a sequence of pairs of names, one for each capacity; got {type(formats).__name__}"
        )
    if len(formats) != layers:
        raise BudgetError(f"formats has {len(formats)} entries for {layers} capacities; give one for each of them")
    pairs = tuple(checked_pair(pair, layer) for layer, pair in enumerate(formats))
    return pairs if any(pairs) else None


def checked_pair(pair: Any, layer: int) -> LayerFormats | None:
    """The formats of one layer, None where both are `"model"`.

    Raises:
        BudgetError: something else than a pair, or an unknown name.
    """
    if pair is None:
        return None
    if not _is_sequence(pair) or len(pair) != 2:
        raise BudgetError(
            f"the formats of layer {layer} must be None or a pair of names, of keys and of values; got {pair!r:.100}"
        )
    keys, values = pair
    for what, name in (("keys", keys), ("values", values)):
        if not _is_format(name):
            raise BudgetError(
                f"unknown format {name!r:.100} of the {what} of layer {layer}; choose one of {', '.join(SLOT_FORMATS)}"
            )
    return None if (keys, values) == _IN_MODEL else (keys, values)


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Of names or pairs, so that a string is not one."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_format(name: object) -> TypeGuard[SlotFormat]:
    return isinstance(name, str) and name in SLOT_FORMATS
