"""`solve_plan`: every constraint honoured exactly or refused, and a plan that says how it was made."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from xkv_fx import Budgets
from xkv_fx.errors import BudgetError
from xkv_fx.layers import LayerSpec
from xkv_fx.planning.data.curves import retention_curve
from xkv_fx.planning.data.profile_data import Profile
from xkv_fx.planning.solve.allocators import allocator
from xkv_fx.planning.solve.fill import capacities_for_retention, capacities_for_total
from xkv_fx.planning.solve.plan import solve_plan
from xkv_fx.policy import Policy

Array = NDArray[Any]

FULL = LayerSpec(query_heads=8, kv_heads=2, key_dim=16, value_dim=16, itemsize=2)
SLIDING = dataclasses.replace(FULL, sliding_window=40)
LATENT = dataclasses.replace(FULL, kv_heads=1, key_dim=24, value_dim=3)
POLICY = Policy(sinks=2, eviction="scored")


def make_profile(layers: tuple[LayerSpec, ...] = (FULL,) * 5, lengths: tuple[int, ...] = (100, 160)) -> Profile:
    """Layers that differ in how much their attention is concentrated."""
    rng = np.random.default_rng(0)
    curves = tuple(
        np.stack([retention_curve(rng.random((2, n)) ** (1 + 3 * layer), POLICY) for layer in range(len(layers))])
        for n in lengths
    )
    return Profile(tuple(c.astype(np.float32) for c in curves), POLICY, layers, "fingerprint")


PROFILE = make_profile()
MIXED = make_profile((FULL, SLIDING, LATENT, FULL, SLIDING, LATENT))


# Each constraint


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.384, 0.7, 1.0, 1, Fraction(1, 3), np.float32(0.5)])
def test_fraction_is_of_layers_times_context(fraction: Any) -> None:
    budgets = solve_plan(PROFILE, fraction=fraction)
    assert budgets.total_tokens == int(float(fraction) * 5 * 160 + 1e-9)
    assert budgets.provenance.constraint == {"fraction": float(fraction)}
    budgets = solve_plan(PROFILE, fraction=fraction, context=1000)
    assert budgets.total_tokens == int(float(fraction) * 5 * 1000 + 1e-9)


def test_fraction_is_not_lost_to_rounding() -> None:
    assert solve_plan(PROFILE, fraction=0.47, context=20).total_tokens == 47  # 0.47 * 5 * 20 is 46.99999999999999


@pytest.mark.parametrize("total", [5, 6, 79, 80, 81, 333, 799, 800])
@pytest.mark.parametrize("multiple", [1, 16])
def test_total_tokens_is_exact(total: int, multiple: int) -> None:
    budgets = solve_plan(PROFILE, total_tokens=total, multiple=multiple)
    assert budgets.total_tokens == total
    expected = capacities_for_total(PROFILE.mean_curve(160), total, multiple=multiple)
    assert budgets.capacities == tuple(expected.tolist())


def test_capacities_are_multiples_of_sixteen_by_default() -> None:
    capacities = solve_plan(PROFILE, total_tokens=500).capacities
    assert sum(capacity % 16 != 0 for capacity in capacities) == 1
    assert all(capacity % 16 == 0 for capacity in solve_plan(PROFILE, retention=0.8).capacities)


@pytest.mark.parametrize("retention", [0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("multiple", [1, 16])
def test_retention_is_reached(retention: float, multiple: int) -> None:
    budgets = solve_plan(PROFILE, retention=retention, multiple=multiple)
    assert PROFILE.retention(budgets.capacities) >= retention
    expected = capacities_for_retention(PROFILE.mean_curve(160), retention, multiple=multiple)
    assert budgets.capacities == tuple(expected.tolist())


def test_retention_of_one_is_within_reach_of_sliding_windows() -> None:
    budgets = solve_plan(MIXED, retention=1.0, context=1000)
    assert budgets.provenance.expected_retention == 1.0
    assert max(budgets.capacities[1], budgets.capacities[4]) <= 40


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.int8, np.dtype("float16")])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("profile", [PROFILE, MIXED], ids=["equal", "mixed"])
def test_kv_bytes_are_used_up_and_never_exceeded(profile: Profile, rows: int, dtype: Any) -> None:
    slot = [spec.slot_bytes(dtype) * rows for spec in profile.layers]
    caps = [spec.effective_capacity(160) for spec in profile.layers]
    lowest, highest = sum(slot), sum(a * b for a, b in zip(slot, caps, strict=True))
    for kv_bytes in np.linspace(lowest, highest + 1000, 25).astype(int):
        budgets = solve_plan(profile, kv_bytes=int(kv_bytes), batch_size=rows, dtype=dtype)
        taken = budgets.kv_bytes(profile.layers, batch_size=rows, dtype=dtype)
        assert taken <= kv_bytes
        for capacity, cap, price in zip(budgets.capacities, caps, slot, strict=True):
            assert capacity == cap or taken + price > kv_bytes, "a further slot would fit"


def test_equal_slots_turn_bytes_into_a_total() -> None:
    slot = FULL.slot_bytes()
    by_bytes = solve_plan(PROFILE, kv_bytes=slot * 333 + slot - 1)
    assert by_bytes.capacities == solve_plan(PROFILE, total_tokens=333).capacities
    assert by_bytes.provenance.constraint == {"kv_bytes": slot * 333 + slot - 1}
    by_bytes = solve_plan(PROFILE, kv_bytes=4 * 8 * slot * 100, batch_size=8, dtype=torch.float64)
    assert by_bytes.total_tokens == 100
    assert by_bytes.provenance.constraint == {"kv_bytes": 3200 * slot, "batch_size": 8, "itemsize": 8}


def test_more_bytes_than_any_layer_can_use_fill_every_layer() -> None:
    assert solve_plan(PROFILE, kv_bytes=10**12).capacities == (160,) * 5
    assert solve_plan(MIXED, kv_bytes=10**12).capacities == (160, 40, 160, 160, 40, 160)


# Context, caps, floor, allocators


def test_sliding_windows_cap_their_layers() -> None:
    budgets = solve_plan(MIXED, total_tokens=500)
    assert max(budgets.capacities[1], budgets.capacities[4]) <= 40
    assert budgets.total_tokens == 500
    assert solve_plan(MIXED, total_tokens=6 * 20, context=20).capacities == (20,) * 6


def test_floor_is_kept() -> None:
    capacities = solve_plan(MIXED, total_tokens=400, floor=48).capacities
    assert [capacity for layer, capacity in enumerate(capacities) if layer not in (1, 4)] >= [48] * 4
    assert capacities[1] == capacities[4] == 40


@pytest.mark.parametrize("profile", [PROFILE, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize(
    "constraint", [{"fraction": 0.4}, {"total_tokens": 300}, {"retention": 0.8}, {"kv_bytes": 40_000}]
)
def test_uniform_under_every_constraint(profile: Profile, constraint: dict[str, Any]) -> None:
    budgets = solve_plan(profile, allocator="uniform", **constraint)
    solved = solve_plan(profile, **constraint)
    assert budgets.provenance.allocator == "uniform"
    assert len({c for c, spec in zip(budgets.capacities, profile.layers, strict=True) if not spec.sliding_window}) <= 3
    if "retention" in constraint:
        assert profile.retention(budgets.capacities) >= 0.8
        assert budgets.total_tokens >= solved.total_tokens
    elif "kv_bytes" in constraint:
        assert budgets.kv_bytes(profile.layers) <= 40_000
        one_more = allocator("uniform")(
            profile.mean_curve(160),
            budgets.total_tokens + 1,
            caps=[spec.effective_capacity(160) for spec in profile.layers],
            multiple=16,
        )
        assert Budgets(tuple(one_more.tolist())).kv_bytes(profile.layers) > 40_000
    elif "fraction" in constraint and profile is MIXED:
        full, dearest = solved.provenance.full_kv_bytes or 0, max(spec.slot_bytes() for spec in profile.layers)
        for plan in (budgets, solved):
            assert 0.4 * full - dearest < plan.kv_bytes(profile.layers) <= 0.4 * full
    else:
        assert budgets.total_tokens == solved.total_tokens
        assert profile.retention(solved.capacities) > profile.retention(budgets.capacities)


def test_ones_own_allocator() -> None:
    class Pyramid:
        name = "pyramid"

        def __call__(self, curves: Array, total: int, *, floor: int, caps: Array, multiple: int) -> Array:
            layers = len(curves)
            weights = np.arange(layers, 0, -1) / (layers * (layers + 1) / 2)
            capacities = np.floor(weights * total).astype(int)
            capacities[-1] += total - capacities.sum()
            return capacities

    pyramid: Any = Pyramid()
    assert solve_plan(PROFILE, total_tokens=150, allocator=pyramid).capacities == (50, 40, 30, 20, 10)
    budgets = solve_plan(PROFILE, total_tokens=150, allocator=pyramid)
    assert budgets.provenance.allocator == "pyramid"
    with pytest.raises(BudgetError, match="'pyramid' returned capacities outside"):
        solve_plan(PROFILE, total_tokens=700, allocator=pyramid)


# What a plan says about itself


@pytest.mark.parametrize("name", ["xkv", "calibrated"])
def test_ones_own_allocator_may_have_the_name_of_another(name: str) -> None:
    class Even:
        def __call__(self, curves: Any, total: int, **bounds: Any) -> Any:
            return allocator("uniform")(curves, total, **bounds)

    even: Any = Even()
    even.name = name
    for constraint in ({"kv_bytes": 40_000}, {"retention": 0.7}):
        ours = solve_plan(MIXED, allocator=even, **constraint)  # type: ignore[arg-type]
        assert ours.capacities == solve_plan(MIXED, allocator="uniform", **constraint).capacities  # type: ignore[arg-type]


def test_a_plan_says_how_it_was_made(tmp_path: Path) -> None:
    budgets = solve_plan(PROFILE, fraction=0.25, context=120)
    assert budgets.policy == POLICY
    made = budgets.provenance
    assert made.model == "fingerprint"
    assert made.allocator == "xkv"
    assert made.constraint == {"fraction": 0.25}
    assert made.context == 120
    assert made.source == PROFILE.digest()
    assert type(made.expected_retention) is float
    assert made.expected_retention == PROFILE.retention(budgets.capacities, context=120)
    budgets.save(tmp_path / "plan.json")
    assert Budgets.load(tmp_path / "plan.json") == budgets


def test_numpy_numbers_are_recorded_as_plain_ones(tmp_path: Path) -> None:
    for constraint in ({"total_tokens": np.int64(300)}, {"retention": np.float32(0.5)}, {"kv_bytes": np.int64(9999)}):
        budgets = solve_plan(PROFILE, context=np.int64(100), floor=np.int64(2), batch_size=np.int64(1), **constraint)  # type: ignore[arg-type]
        budgets.save(tmp_path / "plan.json")
        assert Budgets.load(tmp_path / "plan.json") == budgets


def test_more_tokens_never_keep_less() -> None:
    kept = [
        solve_plan(PROFILE, total_tokens=total, multiple=1).provenance.expected_retention for total in range(5, 801, 9)
    ]
    assert kept == sorted(kept)  # type: ignore[type-var]


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of fraction, total_tokens, retention, kv_bytes; got none"),
        ({"fraction": 0.5, "retention": 0.9}, "got fraction, retention"),
        ({"fraction": 0.0}, "fraction must be above 0 and at most 1; got 0.0"),
        ({"fraction": -0.5}, "fraction must be above 0"),
        ({"fraction": 1.01}, "fraction must be above 0 and at most 1; got 1.01"),
        ({"fraction": float("nan")}, "fraction must be finite; got nan"),
        ({"fraction": float("inf")}, "fraction must be finite; got inf"),
        ({"fraction": True}, "fraction must be a number; got True"),
        ({"fraction": "0.5"}, "fraction must be a number; got '0.5'"),
        ({"fraction": 0.001}, "total of 0 tokens is below one slot a layer; 5 layers need at least 5"),
        ({"total_tokens": 4}, "total of 4 tokens is below one slot a layer"),
        ({"total_tokens": 0}, "below one slot a layer"),
        ({"total_tokens": 801}, "above layers x context = 5 x 160 = 800"),
        ({"total_tokens": 401, "context": 80}, "above layers x context = 5 x 80 = 400"),
        ({"total_tokens": 300.0}, "total_tokens must be a whole number; got 300.0"),
        ({"total_tokens": float("nan")}, "total_tokens must be a whole number"),
        ({"total_tokens": True}, "total_tokens must be a number; got True"),
        ({"total_tokens": 300, "floor": 61}, "below the floor of 61 slots a layer; 5 layers need at least 305"),
        ({"retention": 0.0}, "retention must be a number above 0"),
        ({"retention": 1.5}, "retention must be a number above 0 and at most 1; got 1.5"),
        ({"retention": float("nan")}, "retention must be finite"),
        ({"retention": np.True_}, "retention must be a number"),
        ({"kv_bytes": 639}, "kv_bytes of 639 is below one slot a layer, which takes 640 bytes"),
        ({"kv_bytes": 1279, "floor": 2}, "below the floor of 2 slots a layer, which takes 1280 bytes"),
        ({"kv_bytes": 1279, "batch_size": 2}, "which takes 1280 bytes"),
        ({"kv_bytes": 1279, "dtype": torch.float32}, "which takes 1280 bytes"),
        ({"kv_bytes": -1}, "below one slot a layer"),
        ({"kv_bytes": 1e6}, "kv_bytes must be a whole number; got 1000000.0"),
        ({"kv_bytes": 10_000, "batch_size": 0}, "batch_size must be a whole number of at least 1; got 0"),
        ({"kv_bytes": 10_000, "batch_size": 1.0}, "batch_size must be a whole number"),
        ({"kv_bytes": 10_000, "dtype": "float16"}, "dtype must have its size in bytes"),
        ({"kv_bytes": 10_000, "dtype": np.float16}, "dtype must have its size in bytes"),
        ({"fraction": 0.5, "context": 0}, "context must be a whole number of at least 1; got 0"),
        ({"fraction": 0.5, "context": 100.0}, "context must be a whole number"),
        ({"fraction": 0.5, "context": True}, "context must be a whole number"),
        ({"fraction": 0.5, "multiple": 0}, "multiple must be a whole number of at least 1"),
        ({"fraction": 0.5, "floor": 0}, "floor must be a whole number of at least 1"),
        ({"fraction": 0.5, "floor": 161}, "floor of 161 slots is above the context of 160"),
        ({"fraction": 0.5, "allocator": "ours"}, "unknown allocator 'ours'; registered are"),
        ({"fraction": 0.5, "allocator": 3}, "an allocator is a registered name"),
    ],
)
def test_what_cannot_be_met_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        solve_plan(PROFILE, **options)


def test_a_total_above_what_sliding_windows_hold_is_refused() -> None:
    with pytest.raises(BudgetError, match="within layers x context = 960, but above the 720 that the layers can hold"):
        solve_plan(MIXED, total_tokens=721)
    assert solve_plan(MIXED, total_tokens=720).capacities == (160, 40, 160, 160, 40, 160)


def test_only_a_profile_is_solved() -> None:
    with pytest.raises(BudgetError, match=r"solve takes an xkv_fx\.Profile or Calibration; got dict"):
        solve_plan({}, fraction=0.5)  # type: ignore[arg-type]


# Fractions


WINDOWS = make_profile((FULL, SLIDING, SLIDING, FULL, SLIDING))


@pytest.mark.parametrize("fraction", [0.2, 0.25, 0.384, 0.47, 0.9, 1.0, "38.4%"])
@pytest.mark.parametrize("allocator_", ["xkv", "uniform", "pyramid"])
@pytest.mark.parametrize("profile", [WINDOWS, MIXED], ids=["windows", "mixed"])
def test_a_fraction_is_of_the_bytes_that_a_full_cache_holds(profile: Profile, fraction: Any, allocator_: str) -> None:
    plan = solve_plan(profile, fraction=fraction, context=150, allocator=allocator_, multiple=1)
    share = 0.384 if fraction == "38.4%" else fraction
    full = Budgets.full(len(profile.layers), 150).kv_bytes(profile.layers)
    taken, dearest = plan.kv_bytes(profile.layers), max(spec.slot_bytes() for spec in profile.layers)
    assert share * full - dearest < taken <= share * full
    made = plan.provenance
    assert (made.constraint, made.kv_bytes, made.full_kv_bytes) == ({"fraction": share}, taken, full)
    assert made.share == taken / full


def test_a_fraction_in_per_cent_without_the_sign_says_what_was_meant() -> None:
    with pytest.raises(BudgetError, match=r'got 38.4; did you mean 0.384, that is "38.4%"\?'):
        solve_plan(PROFILE, fraction=38.4)


# One format for all layers


def test_a_profile_is_solved_for_slots_of_other_formats() -> None:
    heads = Profile(PROFILE.curves, POLICY, (dataclasses.replace(FULL, kv_heads=1),) * 5, "fingerprint", {}, (2, 2, 1))
    pair = ("int8", "int4")
    for profile in (PROFILE, heads):
        slot = profile.layers[0].slot_bytes(formats=pair)
        most = sum(spec.slot_bytes() for spec in profile.layers) * 160
        plan = solve_plan(profile, fraction=0.125, formats=pair)
        capacities = np.hstack([np.atleast_1d(of_layer) for of_layer in plan.capacities])
        assert plan.formats == (pair,) * len(profile.model_layers)
        assert most / 8 - slot < plan.kv_bytes(profile.model_layers) <= most / 8
        assert plan.provenance.kv_bytes == plan.kv_bytes(profile.model_layers)
        same = solve_plan(profile, total_tokens=capacities.sum()) if profile is PROFILE else None
        assert same is None or same.capacities == plan.capacities, "shared like as many tokens of any size"
    assert solve_plan(PROFILE, fraction=1.0, formats=pair).capacities == (160,) * 5
    assert solve_plan(PROFILE, fraction=0.5, formats=("model", "model")) == solve_plan(PROFILE, fraction=0.5)
    with pytest.raises(BudgetError, match="unknown format 'int3' of the values of all layers"):
        solve_plan(PROFILE, fraction=0.5, formats=("int8", "int3"))  # type: ignore[arg-type]
