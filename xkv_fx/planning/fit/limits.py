"""The limit of a fit, as users give it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from xkv_fx.errors import BudgetError
from xkv_fx.layers import LayerSpec
from xkv_fx.planning.solve.constraints import bytes_of_fraction
from xkv_fx.sizes import bytes_of, share_of


def only_limit(**limits: Any) -> tuple[str, int | float]:
    """The name and value of the one limit that was given: `"kv_bytes"` in bytes, `"fraction"` as a share, or `"kl"`.

    Raises:
        BudgetError: none or several, or one out of its range.
    """
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) != 1:
        raise BudgetError(f"give exactly one of {', '.join(limits)}; got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if name == "kl":
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
            raise BudgetError(f"kl must be a number above 0, in nats; got {value!r}")
        return name, float(value)
    if name == "fraction":
        return name, share_of(value, name)
    return "kv_bytes", bytes_of(value, name)


def in_bytes(name: str, value: float, layers: Sequence[LayerSpec], context: int, batch_size: int) -> int | None:
    """That limit in bytes; None for a bound on the KL.

    Args:
        context: tokens of prompt that a fraction is of.

    Raises:
        BudgetError: a fraction that is no share above 0 and at most 1.
    """
    if name == "kl":
        return None
    return bytes_of_fraction(value, layers, context) * batch_size if name == "fraction" else int(value)
