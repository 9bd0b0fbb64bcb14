"""How slots store keys and values: the names of formats, a pair of them for each layer, and the bytes that they take.

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
"""The format of a layer's keys, and the format of its values."""

HeadFormats = tuple[LayerFormats | None, ...]
"""The formats of each KV head of a layer, None for the model's dtype."""
PlannedFormats = LayerFormats | HeadFormats | None
"""How a plan stores a layer: all of its heads alike, or each KV head in formats of its own."""

_IN_MODEL: LayerFormats = ("model", "model")

CODE_BITS = {"fp8": 8, "int8": 8, "int4": 4}
"""Bits per element, for formats that store codes."""
_LARGEST_GROUP = 64
_GROUP_MULTIPLE = 8
_SCALE_BYTES = 2  # half precision; a group of whole numbers has a scale and a zero


def group_of(dim: int) -> int:
    """How many elements of a vector of `dim` share a scale and a zero: the largest multiple of 8 up to 64 that divides
    it.

    Raises:
        BudgetError: there is none.
    """
    for size in range(_LARGEST_GROUP, 0, -_GROUP_MULTIPLE):
        if dim % size == 0:
            return size
    raise BudgetError(
        f"no group of {_GROUP_MULTIPLE} to {_LARGEST_GROUP} elements divides a head size of {dim}; store it in the "
        "model's dtype"
    )


def vector_bytes(name: SlotFormat, dim: int, itemsize: int) -> int:
    """Bytes of a vector of `dim` elements in a format: elements, or codes with their scales and zeros.

    Args:
        itemsize: bytes of an element in the model's dtype.

    Raises:
        BudgetError: this format cannot store such a vector.
    """
    if name == "model":
        return dim * itemsize
    return dim * CODE_BITS[name] // 8 + scales_of(name, dim) * _SCALE_BYTES


def scales_of(name: SlotFormat, dim: int) -> int:
    """Numbers in half precision beside the codes of a vector: a scale and a zero for each group of whole numbers, one
    scale for all of a vector's `"fp8"` numbers, which bring an exponent each.

    Raises:
        BudgetError: as `group_of`.
    """
    return 1 if name == "fp8" else 2 * (dim // group_of(dim))


def check_latent(pair: LayerFormats) -> None:
    """Refuse two formats for keys and values that are one vector.

    Raises:
        BudgetError: they differ.
    """
    keys, values = pair
    if keys != values:
        raise BudgetError(
            f"keys and values are one latent, which is stored once; give one format for both, not {keys} and {values}"
        )


def codes_keys(formats: PlannedFormats) -> bool:
    """Whether a layer stores keys, of any of its heads, in another format than the model's dtype."""
    return any(pair is not None and pair[0] != "model" for pair in formats_of_heads(formats, 1))


def pair_name(pair: LayerFormats | None) -> str:
    """The formats of a layer in a word: `int8`, or `int8/int4` where keys and values differ."""
    keys, values = pair or _IN_MODEL
    return keys if keys == values else f"{keys}/{values}"


def pair_of_name(name: str) -> LayerFormats | None:
    """The formats of keys and values that `pair_name` calls so, None for the model's dtype.

    Raises:
        BudgetError: an unknown name.
    """
    keys, _, values = name.partition("/")
    return checked_pair((keys, values or keys), f"what is named {name!r:.100}")


def is_by_head(formats: PlannedFormats) -> TypeGuard[HeadFormats]:
    """Whether each KV head of the layer has formats of its own."""
    return formats is not None and not any(isinstance(one, str) for one in formats)


def formats_of_heads(formats: PlannedFormats, heads: int) -> HeadFormats:
    """The formats of each of so many KV heads."""
    if is_by_head(formats):
        return formats
    return (formats,) * heads  # type: ignore[return-value]


def checked_formats(formats: Any, layers: int) -> tuple[PlannedFormats, ...] | None:
    """The formats of a plan in one normal form, so that plans that store the same way are equal.

    Args:
        formats: None, or for each layer None or a pair of names, of its keys and of its values; or a sequence of these,
            one for each of the layer's KV heads.
        layers: how many there are.

    Returns:
        for each layer its pair, or None where both are `"model"`, or a tuple of these, one for each KV head; None where
        everything is in the model's dtype.

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
    checked = tuple(_checked_layer(of_layer, f"layer {layer}") for layer, of_layer in enumerate(formats))
    return checked if any(checked) else None


def _checked_layer(formats: Any, where: str) -> PlannedFormats:
    """The formats of one layer; None where all of its heads are in the model's dtype."""
    by_head = _is_sequence(formats) and len(formats) > 0 and all(one is None or _is_sequence(one) for one in formats)
    if not by_head:
        return checked_pair(formats, where)
    pairs = tuple(checked_pair(pair, f"{where}, KV head {head}") for head, pair in enumerate(formats))
    return pairs if any(pairs) else None


def checked_pair(pair: Any, where: str) -> LayerFormats | None:
    """The formats of one layer, None where both are `"model"`.

    Args:
        where: whose they are, for the message, such as "layer 3".

    Raises:
        BudgetError: something else than a pair, or an unknown name.
    """
    if pair is None:
        return None
    if not _is_sequence(pair) or len(pair) != 2:
        raise BudgetError(
            f"the formats of {where} must be None or a pair of names, of keys and of values; got {pair!r:.100}"
        )
    keys, values = pair
    for what, name in (("keys", keys), ("values", values)):
        if not _is_format(name):
            raise BudgetError(
                f"unknown format {name!r:.100} of the {what} of {where}; choose one of {', '.join(SLOT_FORMATS)}"
            )
    return None if (keys, values) == _IN_MODEL else (keys, values)


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Of names or pairs, so that a string is not one."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_format(name: object) -> TypeGuard[SlotFormat]:
    return isinstance(name, str) and name in SLOT_FORMATS
