"""A limit in bytes holds for all that is allocated: with room for appended tokens, in every kind of plan."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from xkv_fx import Calibration, LayerSpec, Policy, Profile, solve
from xkv_fx.errors import BudgetError
from xkv_fx.planning.measure.points import pairs_to_measure, points_to_measure
from xkv_fx.planning.solve.fill_formats import capacities_and_pairs
from xkv_fx.planning.solve.room import make_room

FULL = LayerSpec(query_heads=4, kv_heads=2, key_dim=16, value_dim=16, itemsize=4)
NEAR = dataclasses.replace(FULL, sliding_window=24)
WIDE = dataclasses.replace(FULL, key_dim=32, value_dim=48)
APPEND = Policy(eviction="append")
KINDS = {"plain": (FULL,) * 4, "windows": (FULL, NEAR, FULL, NEAR), "mixed": (FULL, NEAR, WIDE, NEAR)}


def profiled(layers: tuple[LayerSpec, ...], policy: Policy = APPEND, tokens: int = 60) -> Profile:
    shares = np.linspace(0, 1, tokens + 1)
    curves = np.stack([shares ** (1 / (1 + layer)) for layer in range(len(layers))]).astype(np.float32)
    return Profile((curves,), policy, layers, "a model")


def calibrated(layers: tuple[LayerSpec, ...], names: Any = None, tokens: int = 60) -> Calibration:
    points = points_to_measure(pairs_to_measure(names), None, layers)
    rng = np.random.default_rng(1)
    bits = np.array([16 if pair is None else FULL.slot_bytes(formats=pair) / 8 for _, pair in points])
    kl = rng.uniform(0.01, 0.1, (1, len(layers), 1)) * (1 / np.array(points.shares) - 1)
    kl = kl + np.where(bits == 16, 0, 4.0**-bits)
    return Calibration(
        kl.astype(np.float32), points.shares, (tokens,), 4, APPEND, layers, "a model", points.formats
    )  # fmt: skip


MEASURED = {
    **{f"profile of {name}": profiled(layers) for name, layers in KINDS.items()},
    **{f"calibration of {name}": calibrated(layers) for name, layers in KINDS.items()},
    **{f"formats of {name}": calibrated(layers, ("model", "int8", "int4")) for name, layers in KINDS.items()},
}


@pytest.mark.parametrize("measured", MEASURED.values(), ids=MEASURED)
@pytest.mark.parametrize("allocator", [None, "uniform"])
@given(data=st.data())
@examples(25)
def test_no_more_is_allocated_than_the_limit(
    measured: Profile | Calibration, allocator: Any, data: st.DataObject
) -> None:
    if allocator is not None and isinstance(measured, Calibration) and measured.formats is not None:
        return
    rows, room, floor = (data.draw(st.integers(low, high)) for low, high in ((1, 3), (0, 80), (1, 5)))
    dtype = data.draw(st.sampled_from([None, np.dtype("float16")]))
    multiple = data.draw(st.sampled_from([1, 4, 16]))
    fewest = sum(
        min(spec.slot_bytes(dtype, pair) for pair in getattr(measured, "pairs", (None,)))
        * spec.effective_capacity(floor + room)
        for spec in measured.layers
    )
    limit = rows * fewest + data.draw(st.integers(0, 60_000))
    options: dict[str, Any] = {"batch_size": rows, "dtype": dtype, "floor": floor, "multiple": multiple}
    plan = solve(measured, kv_bytes=limit, max_new_tokens=room, allocator=allocator, context=60, **options)
    taken = plan.kv_bytes(measured.layers, rows, dtype, room)
    assert taken <= limit
    said = {"kv_bytes": limit, "batch_size": rows, "itemsize": 2 if dtype else None, "max_new_tokens": room}
    assert plan.provenance.constraint == {
        key: value for key, value in said.items() if value and (key, value) != ("batch_size", 1)
    }
    if allocator is None:  # the rest pays for no further slot
        for at, spec in enumerate(measured.layers):
            assert floor <= plan.capacities[at] or plan.capacities[at] == spec.effective_capacity(60)
            more = (*plan.capacities[:at], plan.capacities[at] + 1, *plan.capacities[at + 1 :])
            larger = dataclasses.replace(plan, capacities=more)
            full = plan.capacities[at] == spec.effective_capacity(60)
            assert full or larger.kv_bytes(measured.layers, rows, dtype, room) > limit


@pytest.mark.parametrize("room", [0, 3, 5, 20])
def test_sliding_windows_cost_no_more_than_themselves(room: int) -> None:
    """By brute force: what the capacities take, against all plans of two layers."""
    layers = (dataclasses.replace(FULL, sliding_window=6), FULL)
    found = make_room(layers, 10, APPEND, room)
    slots = [[spec.effective_capacity(c + room) for c in range(1, spec.effective_capacity(10) + 1)] for spec in layers]
    for at, spec in enumerate(layers):
        for capacity in range(1, int(found.caps[at]) + 1):
            assert slots[at][capacity - 1] == capacity + found.slots[at]
        assert slots[at][int(found.caps[at]) - 1] == slots[at][-1] or found.caps[at] == found.held[at]
        assert found.held[at] == spec.effective_capacity(10)


def test_formats_and_room_are_chosen_together() -> None:
    """Against all choices: with much room, fewer bits pay more than by their capacities alone."""
    curves = np.array([[[5.0, 3, 1.5, 1, 0]] * 2, [[5.2, 3.2, 1.7, 1.2, 0.3]] * 2])
    prices = np.array([[8, 8], [4, 4]])
    least = np.ones((2, 2), int)
    for room, limit in itertools.product((0, 2, 7), range(8, 200, 3)):
        choices = [
            (
                sum(prices[p, at] * (c + room) for at, (c, p) in enumerate(both)),
                sum(curves[p, at, c] for at, (c, p) in enumerate(both)),
            )
            for both in itertools.product(itertools.product(range(1, 5), range(2)), repeat=2)
        ]
        within = [kl for size, kl in choices if size <= limit]
        options: dict[str, Any] = {"caps": [4, 4], "room": np.full(2, room)}
        if not within:
            with pytest.raises(BudgetError, match="below one slot a layer"):
                capacities_and_pairs(curves, prices, least, limit, **options)
            continue
        capacities, pairs = capacities_and_pairs(curves, prices, least, limit, **options)
        assert sum(prices[pairs, range(2)] * (capacities + room)) <= limit
        assert curves[pairs, range(2), capacities].sum() < min(within) + 2.0 + 1e-9  # the largest single step


def test_room_counts_under_append_alone() -> None:
    ring = profiled(KINDS["plain"], Policy())
    with_room, without = (solve(ring, kv_bytes=20_000, max_new_tokens=room, context=60) for room in (64, 0))
    assert with_room == without


def test_room_that_leaves_nothing_is_refused() -> None:
    measured = MEASURED["profile of plain"]
    with pytest.raises(BudgetError, match="below one slot a layer, which takes 66560 bytes with the room for max_new"):
        solve(measured, kv_bytes=20_000, max_new_tokens=64)
    for room in (-1, 1.5, True):
        with pytest.raises(BudgetError, match="max_new_tokens must be a whole number of at least 0"):
            solve(measured, kv_bytes=20_000, max_new_tokens=room)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="room for max_new_tokens aside inside kv_bytes, not inside fraction"):
        solve(measured, fraction=0.5, max_new_tokens=64)


def test_a_limit_far_above_what_the_context_can_use_says_which_context_it_serves() -> None:
    measured, slot = MEASURED["profile of windows"], FULL.slot_bytes()
    with pytest.warns(UserWarning, match=r"the limit serves up to context=952, .* with context=60 this plan is right"):
        plan = solve(measured, kv_bytes=2 * slot * (24 + 952))
    assert plan.capacities == (60, 24, 60, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solve(measured, kv_bytes=2 * slot * (24 + 952), context=952).capacities == (952, 24, 952, 24)
        solve(measured, kv_bytes=2 * slot * (24 + 952), context=60)
        solve(measured, kv_bytes=2 * slot * (24 + 119))  # not far above
        solve(profiled((NEAR, NEAR)), kv_bytes=10**9)  # no prompt would lose anything
    with pytest.warns(UserWarning, match="context=948"):  # room comes on top
        solve(measured, kv_bytes=2 * slot * (24 + 952), max_new_tokens=4)
