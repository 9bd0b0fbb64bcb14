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


def only_constraint(**constraints: Any) -> tuple[str, Any]:
    """The name and value of the one constraint that was given, the value as a plain finite number."""
    given = {name: value for name, value in constraints.items() if value is not None}
    if len(given) != 1:
        named = ", ".join(given) or "none"
        raise BudgetError(f"give exactly one of {', '.join(constraints)}; got {named}")
    ((name, value),) = given.items()
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise BudgetError(f"{name} must be a number; got {value!r}")
    if name in ("total_tokens", "kv_bytes"):
        if not is_int(value):
            raise BudgetError(f"{name} must be a whole number; got {value!r}")
        return name, int(value)
    if not math.isfinite(value):
        raise BudgetError(f"{name} must be finite; got {value!r}")
    return name, float(value)


def check_fraction(fraction: float) -> None:
    """Refuse what is no share above 0 and at most 1.

    Raises:
        BudgetError: as said.
    """
    if not 0 < fraction <= 1:
        raise BudgetError(f"fraction must be above 0 and at most 1; got {fraction!r}")


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


def what_bytes_are_of(batch_size: int, dtype: HasItemSize | None) -> dict[str, float]:
    """What a plan's constraint says beside `kv_bytes`."""
    said: dict[str, float] = {} if batch_size == 1 else {"batch_size": int(batch_size)}
    return said if dtype is None else {**said, "itemsize": dtype.itemsize}
