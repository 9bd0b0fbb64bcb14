"""From a calibration of several formats to a plan: each layer's capacity and formats, chosen together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xkv_fx.budgets import Plan, Provenance
from xkv_fx.errors import BudgetError
from xkv_fx.layers import HasItemSize, LayerSpec
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.solve.constraints import check_fraction, slot_bytes_of, what_bytes_are_of
from xkv_fx.planning.solve.fill_formats import capacities_and_pairs


def plan_with_formats(
    calibration: Calibration,
    name: str,
    value: Any,
    context: int,
    multiple: int,
    floor: int,
    batch_size: int,
    dtype: HasItemSize | None,
) -> Plan:
    """The plan under the constraint `name` of `value`; see `xkv_fx.solve`.

    Raises:
        BudgetError: another constraint than `kv_bytes` or `fraction`, or one that cannot be met.
    """
    layers = calibration.layers
    if name == "kv_bytes":
        kv_bytes, constraint = value, {name: value}
    elif name == "fraction":
        kv_bytes, constraint = bytes_of_fraction(value, layers, context), {name: value}
        batch_size, dtype = 1, None
    else:
        raise BudgetError(
            f"{name} cannot be asked of a calibration of several formats, in which a token has no one size; give "
            "kv_bytes, or the fraction of the bytes that a full cache takes in the model's dtype"
        )
    slot_bytes = np.stack([slot_bytes_of(layers, batch_size, dtype, pair) for pair in calibration.pairs])
    held = np.array([spec.effective_capacity(context) for spec in layers])
    capacities, pairs = capacities_and_pairs(
        calibration.kl_curves(context),
        slot_bytes,
        np.maximum(1, np.round(calibration.least_shares()[:, None] * held)).astype(np.int64),
        kv_bytes,
        caps=held.tolist(),
        floor=floor,
        multiple=multiple,
    )
    formats = tuple(calibration.pairs[pair] for pair in pairs)
    return Plan(
        capacities=tuple(capacities.tolist()),
        policy=calibration.policy,
        provenance=Provenance(
            model=calibration.model,
            allocator="calibrated",
            constraint={**constraint, **what_bytes_are_of(batch_size, dtype)},
            context=context,
            source=calibration.digest(),
            expected_kl=calibration.expected_kl(capacities.tolist(), context, formats),
        ),
        formats=formats,
    )


def bytes_of_fraction(fraction: float, layers: Sequence[LayerSpec], context: int) -> int:
    """The whole bytes in a share of those that a full cache of `context` tokens takes in the model's dtype.

    Raises:
        BudgetError: not a share above 0 and at most 1.
    """
    check_fraction(fraction)
    return int(fraction * sum(spec.slot_bytes() * spec.effective_capacity(context) for spec in layers))
