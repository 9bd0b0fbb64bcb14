"""From a calibration of several formats to a plan: each layer's capacity and formats, chosen together."""

from __future__ import annotations

from typing import Any

import numpy as np

from xkv_fx.budgets import Plan
from xkv_fx.errors import BudgetError
from xkv_fx.layers import HasItemSize
from xkv_fx.planning.data.by_head import planned_by_layer
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.solve.constraints import (
    bytes_held,
    bytes_of_fraction,
    full_bytes,
    slot_bytes_of,
    what_bytes_are_of,
)
from xkv_fx.planning.solve.fill_formats import capacities_and_pairs
from xkv_fx.planning.solve.room import Room
from xkv_fx.provenance import Provenance


def plan_with_formats(
    calibration: Calibration,
    name: str,
    value: Any,
    context: int,
    multiple: int,
    floor: int,
    batch_size: int,
    dtype: HasItemSize | None,
    room: Room,
) -> Plan:
    """The plan under the constraint `name` of `value`; see `xkv_fx.solve`.

    Raises:
        BudgetError: another constraint than `kv_bytes` or `fraction`, or one that cannot be met.
    """
    layers = calibration.layers
    constraint: dict[str, float] = {name: value}
    if name == "kv_bytes":
        kv_bytes = value
    elif name == "fraction":
        kv_bytes = bytes_of_fraction(value, layers, context)
        batch_size, dtype = 1, None
    else:
        raise BudgetError(
            f"{name} cannot be asked of a calibration of several formats, in which a token has no one size; give "
            "kv_bytes, or the fraction of the bytes that a full cache takes in the model's dtype"
        )
    slot_bytes = np.stack([slot_bytes_of(layers, batch_size, dtype, pair) for pair in calibration.pairs])
    if name == "kv_bytes":
        constraint |= what_bytes_are_of(batch_size, dtype, room.tokens)
    capacities, pairs = capacities_and_pairs(
        calibration.kl_curves(context),
        slot_bytes,
        np.maximum(1, np.round(calibration.least_shares()[:, None] * room.held)).astype(np.int64),
        kv_bytes,
        caps=room.caps.tolist(),
        room=room.slots,
        floor=floor,
        multiple=multiple,
    )
    capacities = room.grown(capacities)
    formats = tuple(calibration.pairs[pair] for pair in pairs)
    return Plan(
        capacities=planned_by_layer(capacities.tolist(), calibration.heads),
        policy=calibration.policy,
        provenance=Provenance(
            model=calibration.model,
            allocator="calibrated",
            constraint=constraint,
            context=context,
            source=calibration.digest(),
            expected_kl=calibration.expected_kl(capacities.tolist(), context, formats),
            kv_bytes=bytes_held(layers, capacities.tolist(), formats),
            full_kv_bytes=full_bytes(layers, context),
            sliding_windows=tuple(spec.sliding_window for spec in calibration.model_layers),
        ),
        formats=planned_by_layer(formats, calibration.heads),
        mean_keys=calibration.layer_mean_keys,
    )
