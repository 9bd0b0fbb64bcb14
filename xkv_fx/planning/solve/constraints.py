"""What a plan is asked to keep: one constraint, and what a limit in bytes is for."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int
from xkv_fx.formats import LayerFormats
from xkv_fx.layers import HasItemSize, LayerSpec
from xkv_fx.sizes import bytes_of, check_share, share_of


def only_constraint(**constraints: Any) -> tuple[str, Any]:
    """The name and value of the one constraint that was given, the value as a plain finite number."""
    given = {name: value for name, value in constraints.items() if value is not None}
    if len(given) != 1:
        named = ", ".join(given) or "none"
        raise BudgetError(f"give exactly one of {', '.join(constraints)}; got {named}")
    ((name, value),) = given.items()
    if name == "kv_bytes":
        return name, bytes_of(value, name)
    if name != "total_tokens":
        return name, share_of(value, name)
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise BudgetError(f"{name} must be a number; got {value!r}")
    if not is_int(value):
        raise BudgetError(f"{name} must be a whole number; got {value!r}")
    return name, int(value)


def whole_tokens(fraction: float, layers: int, context: int) -> int:
    """The whole tokens in a share of `layers * context`."""
    return math.floor(fraction * layers * context + 1e-9)  # 0.47 * 5 * 20 is 47, whatever rounding says


def bytes_held(
    layers: Sequence[LayerSpec],
    capacities: Sequence[int],
    formats: Sequence[LayerFormats | None] | None = None,
) -> int:
    """Bytes that one row takes in these capacities and formats, sliding windows clamped, without room for appended
    tokens."""
    stored = (None,) * len(layers) if formats is None else formats
    return sum(
        spec.slot_bytes(formats=pair) * spec.effective_capacity(capacity)
        for spec, capacity, pair in zip(layers, capacities, stored, strict=True)
    )


def full_bytes(layers: Sequence[LayerSpec], context: int) -> int:
    """Bytes that a full cache of one row of `context` tokens takes in the model's dtype, sliding windows clamped."""
    return bytes_held(layers, (context,) * len(layers))


def bytes_of_fraction(fraction: float, layers: Sequence[LayerSpec], context: int) -> int:
    """The whole bytes in a share of `full_bytes`.

    Raises:
        BudgetError: not a share above 0 and at most 1.
    """
    check_share(fraction, "fraction")
    full = full_bytes(layers, context)
    return min(full, math.floor(fraction * full * (1 + 1e-12)))  # so that rounding does not cost a slot


def what_fraction_is(fraction: float, layers: Sequence[LayerSpec], context: int) -> tuple[str, int]:
    """The constraint that a share of `full_bytes` comes to, where all store in the model's dtype: its name and value.

    That is a total of tokens where all slots are of one size, and otherwise bytes.

    Raises:
        BudgetError: not a share above 0 and at most 1.
    """
    check_share(fraction, "fraction")
    if len({spec.slot_bytes() for spec in layers}) > 1:
        return "kv_bytes", bytes_of_fraction(fraction, layers, context)
    held = [spec.effective_capacity(context) for spec in layers]
    if min(held) == context:
        return "total_tokens", whole_tokens(fraction, len(layers), context)
    return "total_tokens", whole_tokens(fraction, 1, sum(held))


def refuse_room(name: str, max_new_tokens: int) -> None:
    """Refuse room for appended tokens where no limit in bytes is given, inside which it would be set aside.

    Raises:
        BudgetError: there is some.
    """
    if max_new_tokens:
        raise BudgetError(
            f"solve sets room for max_new_tokens aside inside kv_bytes, not inside {name}; leave it out here, and give "
            "it to transform"
        )


def slot_bytes_of(
    layers: Sequence[LayerSpec], batch_size: int, dtype: HasItemSize | None, formats: LayerFormats | None = None
) -> NDArray[np.int64]:
    """Bytes of one slot of each layer over all rows, `[layers]`.

    Raises:
        BudgetError: an invalid batch size or dtype, or formats that a layer cannot be stored in.
    """
    if not is_int(batch_size) or batch_size < 1:
        raise BudgetError(f"batch_size must be a whole number of at least 1; got {batch_size!r}")
    itemsize = getattr(dtype, "itemsize", None)
    if dtype is not None and (not is_int(itemsize) or itemsize < 1):
        raise BudgetError(f"dtype must have its size in bytes, as torch.float16 and numpy.dtype have; got {dtype!r}")
    return np.array([spec.slot_bytes(dtype, formats) * int(batch_size) for spec in layers], dtype=np.int64)


def what_bytes_are_of(batch_size: int, dtype: HasItemSize | None, max_new_tokens: int) -> dict[str, float]:
    """What a plan's constraint says beside `kv_bytes`."""
    said: dict[str, float] = {} if batch_size == 1 else {"batch_size": int(batch_size)}
    if dtype is not None:
        said["itemsize"] = dtype.itemsize
    return said if max_new_tokens == 0 else {**said, "max_new_tokens": int(max_new_tokens)}
