"""`solve_plan`: from a profile or a calibration and one constraint to a plan."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xkv_fx.budgets import Plan
from xkv_fx.errors import BudgetError
from xkv_fx.formats import LayerFormats, checked_pair
from xkv_fx.layers import HasItemSize, LayerSpec
from xkv_fx.planning.data.by_head import planned_by_layer, tokens_of_heads
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.data.curves import mean_retention
from xkv_fx.planning.data.profile_data import Profile, check_context
from xkv_fx.planning.solve import allocators, peer_allocators  # noqa: F401  (registers the peers)
from xkv_fx.planning.solve.allocators import Allocator
from xkv_fx.planning.solve.constraints import (
    bytes_held,
    bytes_of_fraction,
    full_bytes,
    only_constraint,
    refuse_room,
    slot_bytes_of,
    what_bytes_are_of,
    what_fraction_is,
)
from xkv_fx.planning.solve.fill import capacities_for_retention, check_retention
from xkv_fx.planning.solve.fill_bytes import capacities_for_bytes, check_kv_bytes
from xkv_fx.planning.solve.limits import Limits, make_limits
from xkv_fx.planning.solve.plan_formats import plan_with_formats
from xkv_fx.planning.solve.room import Room, make_room
from xkv_fx.policy import Policy
from xkv_fx.provenance import Provenance

Curves = NDArray[np.float64]
Capacities = NDArray[np.int64]
_OF_LAYERS = ("pyramid",)
"""Allocators that share by the order of layers."""


def solve_plan(
    profile: Profile | Calibration,
    *,
    fraction: float | str | None = None,
    total_tokens: int | None = None,
    retention: float | str | None = None,
    kv_bytes: int | str | None = None,
    context: int | None = None,
    allocator: str | Allocator | None = None,
    multiple: int = 16,
    floor: int = 1,
    batch_size: int = 1,
    dtype: HasItemSize | None = None,
    max_new_tokens: int = 0,
    formats: LayerFormats | None = None,
) -> Plan:
    """See `xkv_fx.solve`."""
    if not isinstance(profile, Profile | Calibration):
        raise BudgetError(f"solve takes an xkv_fx.Profile or Calibration; got {type(profile).__name__}")
    pair = _checked_formats(formats, profile)
    name, value = only_constraint(fraction=fraction, total_tokens=total_tokens, retention=retention, kv_bytes=kv_bytes)
    context = profile.context_default if context is None else check_context(context)
    layers = profile.layers
    room = make_room(layers, context, profile.policy, max_new_tokens)
    if name != "kv_bytes":
        refuse_room(name, max_new_tokens)
    if isinstance(profile, Calibration) and profile.formats is not None:
        _check_chooses_formats(allocator)
        return plan_with_formats(profile, name, value, context, multiple, floor, batch_size, dtype, room)
    calibrated = isinstance(profile, Calibration)
    if allocator is None:
        allocator = "calibrated" if calibrated else "xkv"
    if profile.heads is not None:
        if isinstance(allocator, str):
            _check_shares_heads(allocator)
        allocator = allocators.CALIBRATED_BY_HEAD if calibrated and allocator == "calibrated" else allocator
    share = allocators.allocator(allocator).reading("kl" if calibrated else "retention", profile.statistics)
    if calibrated and name == "retention":
        raise BudgetError("a calibration holds no retention; give a fraction, total_tokens or kv_bytes, or a profile")
    limits = make_limits(len(layers), context, floor, room.caps, multiple)
    constraint: dict[str, float] = {name: value}
    if name == "total_tokens" and profile.heads is not None:
        value = tokens_of_heads(value, profile.heads)
    if name == "fraction":
        if pair is None:
            name, value = what_fraction_is(value, layers, context)
        else:
            name, value = "kv_bytes", bytes_of_fraction(value, layers, context)
        batch_size, dtype = 1, None

    if name == "kv_bytes":
        slot_bytes = slot_bytes_of(layers, batch_size, dtype, pair)
        if name in constraint:
            constraint |= what_bytes_are_of(batch_size, dtype, room.tokens)
        curves = _objective(profile, share, context)
        capacities = capacities_within_bytes(share, curves, slot_bytes, value, limits, room)
    elif name == "retention":
        check_retention(value, 1.0)
        curves = _objective(profile, share, context)
        capacities = _with_retention(share, curves, value, limits)
    else:
        limits.for_total(value)
        curves = _objective(profile, share, context)
        capacities = _share(share, curves, value, limits)

    return Plan(
        capacities=planned_by_layer(capacities.tolist(), profile.heads),
        policy=profile.policy,
        provenance=Provenance(
            model=profile.model,
            allocator=share.name,
            constraint=constraint,
            context=context,
            source=profile.digest(),
            expected_retention=None if calibrated else mean_retention(curves, capacities),
            expected_kl=profile.expected_kl(capacities.tolist(), context) if isinstance(profile, Calibration) else None,
            kv_bytes=bytes_held(layers, capacities.tolist(), (pair,) * len(layers)),
            full_kv_bytes=full_bytes(layers, context),
            sliding_windows=tuple(spec.sliding_window for spec in profile.model_layers),
        ),
        formats=None if pair is None else (pair,) * len(profile.model_layers),
    )


def _checked_formats(formats: LayerFormats | None, profile: Profile | Calibration) -> LayerFormats | None:
    """The formats that all layers are to be stored in, None for the model's dtype.

    Raises:
        BudgetError: no pair of formats, or one for a calibration, whose divergences are of formats of its own.
    """
    if formats is not None and isinstance(profile, Calibration):
        raise BudgetError(
            "formats are given for a profile, which says nothing about them; a calibration measured KL in its own "
            "formats, so calibrate with formats=... instead"
        )
    return checked_pair(formats, "all layers")


def _objective(profile: Profile | Calibration, share: Allocator, context: int) -> Curves:
    """The curves that an allocator reads."""
    if isinstance(profile, Profile) and share is allocators.allocator("xkv"):
        return profile.objective(context)
    return profile.mean_curve(context)


def _check_shares_heads(name: str) -> None:
    """Refuse an allocator that knows layers only, where KV heads have capacities of their own.

    Raises:
        BudgetError: it is one.
    """
    if name in _OF_LAYERS:
        raise BudgetError(
            f"the allocator {name!r} is made for layers, and this was measured by KV head; leave allocator out, choose "
            "'uniform', or measure by layer"
        )


def _check_chooses_formats(allocator: str | Allocator | None) -> None:
    """Refuse an allocator where layers choose formats, too.

    Raises:
        BudgetError: it is not the one that does so.
    """
    if allocator not in (None, "calibrated"):
        raise BudgetError(
            f"the allocator {allocators.allocator(allocator).name!r} shares tokens of one size and cannot choose "
            "formats; leave allocator out, or calibrate without formats"
        )


def _share(share: Allocator, curves: Curves, total: int, limits: Limits) -> Capacities:
    return share(curves, total, floor=limits.floor, caps=limits.caps, multiple=limits.multiple)


def capacities_within_bytes(
    share: str | Allocator, curves: Curves, slot_bytes: NDArray[np.int64], kv_bytes: int, limits: Limits, room: Room
) -> Capacities:
    """Capacities that take at most `kv_bytes` bytes together with `room`, int64 `[layers]`, a slot of each layer taking
    `slot_bytes` `[layers]`.

    With equal slots that is a total. With unequal ones the solver fills by gain per byte; of another allocator the
    largest total is taken whose plan fits.

    Args:
        limits: whose caps are those of `room`.
    """
    share = allocators.allocator(share)
    fewest, most = int(limits.floors.sum()), int(limits.caps.sum())
    check_kv_bytes(kv_bytes, int((limits.floors + room.slots) @ slot_bytes), limits.floor, room.tokens > 0)
    kv_bytes -= int(room.slots @ slot_bytes)
    if (slot_bytes == slot_bytes[0]).all():
        return room.grown(_share(share, curves, min(kv_bytes // int(slot_bytes[0]), most), limits))
    calibrated = share is allocators.allocator("calibrated")
    if calibrated or share in (allocators.allocator("xkv"), allocators.CALIBRATED_BY_HEAD):
        mean = kv_bytes // int(slot_bytes.sum())
        floor = allocators.calibrated_floor(mean, limits) if calibrated else limits.floor
        filled = capacities_for_bytes(
            curves, slot_bytes, kv_bytes, floor=floor, caps=limits.caps, multiple=limits.multiple
        )
        return room.grown(filled)
    totals = range(fewest, most + 1)
    above = bisect_right(totals, kv_bytes, key=lambda total: int(_share(share, curves, total, limits) @ slot_bytes))
    return room.grown(_share(share, curves, totals[above - 1], limits))


def uniform_within_bytes(
    layers: Sequence[LayerSpec],
    context: int,
    kv_bytes: int,
    formats: LayerFormats | None = None,
    policy: Policy | None = None,
    max_new_tokens: int = 0,
) -> Capacities:
    """The largest capacities of at most `kv_bytes` bytes that are as equal as the layers allow, int64 `[layers]`.

    Args:
        formats: that all layers store in; the model's dtype when None.
        policy, max_new_tokens: what room is set aside inside the bytes; none by default.
    """
    room = make_room(layers, context, policy or Policy(), max_new_tokens)
    limits = make_limits(len(layers), context, 1, room.caps, 1)
    no_curves = np.zeros((len(layers), context + 1))
    return capacities_within_bytes(
        "uniform", no_curves, slot_bytes_of(layers, 1, None, formats), kv_bytes, limits, room
    )


def _with_retention(share: Allocator, curves: Curves, retention: float, limits: Limits) -> Capacities:
    """Capacities that keep at least `retention`, with the fewest tokens.

    For an allocator other than the solver that is the smallest total of whole blocks whose plan keeps enough.
    """
    if share is allocators.allocator("xkv"):
        return capacities_for_retention(
            curves, retention, floor=limits.floor, caps=limits.caps, multiple=limits.multiple
        )
    check_retention(retention, mean_retention(curves, limits.caps))
    lowest, most = int(limits.lows.sum()), int(limits.caps.sum())
    totals = range(lowest, most, limits.multiple)

    def keeps_enough(total: int) -> bool:
        return mean_retention(curves, _share(share, curves, total, limits)) >= retention

    found = bisect_left(totals, True, key=keeps_enough)
    return _share(share, curves, totals[found] if found < len(totals) else most, limits)
