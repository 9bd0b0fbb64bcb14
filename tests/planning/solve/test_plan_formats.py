"""Solving a calibration of several formats: what its constraints mean, and what the plan says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from xkv_fx import Budgets, Calibration, LayerSpec, Policy, solve
from xkv_fx.errors import BudgetError
from xkv_fx.planning.measure.points import pairs_to_measure, points_to_measure

FULL = LayerSpec(query_heads=8, kv_heads=2, key_dim=16, value_dim=16, itemsize=2)
SLIDING = dataclasses.replace(FULL, sliding_window=40)
WIDE = dataclasses.replace(FULL, key_dim=64, value_dim=128)
INT8, INT4 = ("int8", "int8"), ("int4", "int4")


def made(
    layers: tuple[LayerSpec, ...] = (FULL, SLIDING, WIDE, FULL), names: Any = ("model", "int8", "int4"), seed: int = 0
) -> Calibration:
    """Fewer tokens and fewer bits stray further, by what differs from layer to layer."""
    points = points_to_measure(pairs_to_measure(names), None, layers)
    rng = np.random.default_rng(seed)
    evicted, rounded = (10.0 ** rng.uniform(-3, 0, (1, len(layers), 1)) for _ in range(2))
    bits = np.array([16 if pair is None else FULL.slot_bytes(formats=pair) / 8 for _, pair in points])
    kl = evicted * (1 / np.array(points.shares) - 1) + rounded * np.where(bits == 16, 0, 4.0**-bits)
    kl = kl * rng.uniform(0.8, 1.2, (3, *kl.shape[1:]))
    return Calibration(
        kl.astype(np.float32), points.shares, (160, 100, 90), 4, Policy(eviction="append"), layers, "a model",
        points.formats,
    )  # fmt: skip


CALIBRATION = made()
FULL_BYTES = 2 * 160 * FULL.slot_bytes() + 40 * SLIDING.slot_bytes() + 160 * WIDE.slot_bytes()


@pytest.mark.parametrize("fraction", [0.05, 0.125, 0.25, 0.384, 0.7, 1.0, np.float32(0.5)])
def test_fraction_is_of_the_bytes_of_a_full_cache_in_the_models_dtype(fraction: Any) -> None:
    plan = solve(CALIBRATION, fraction=fraction)
    assert plan.kv_bytes(CALIBRATION.layers) <= float(fraction) * FULL_BYTES
    assert plan.provenance.constraint == {"fraction": float(fraction)}
    by_bytes = solve(CALIBRATION, kv_bytes=int(float(fraction) * FULL_BYTES))
    assert (plan.capacities, plan.formats) == (by_bytes.capacities, by_bytes.formats)
    assert solve(CALIBRATION, fraction=fraction, dtype=torch.float64).capacities == plan.capacities


def test_a_fraction_of_one_is_the_full_cache() -> None:
    plan = solve(CALIBRATION, fraction=1.0)
    assert (plan.capacities, plan.formats) == ((160, 40, 160, 160), None)
    assert plan.provenance.expected_kl == 0.0


def test_fewer_bytes_take_fewer_bits_and_fewer_tokens() -> None:
    plans = [solve(CALIBRATION, fraction=fraction) for fraction in (0.7, 0.4, 0.2, 0.1)]
    expected = [plan.provenance.expected_kl for plan in plans]
    assert expected == sorted(expected)  # type: ignore[type-var]
    assert len({(plan.capacities, plan.formats) for plan in plans}) == 4
    kinds = [set(plan.layer_formats) for plan in plans]
    assert all(kind & {INT8, ("int8", "int4"), INT4} for kind in kinds)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_kv_bytes_are_used_up_and_never_exceeded(rows: int, dtype: Any) -> None:
    lowest = sum(spec.slot_bytes(formats=INT4) for spec in CALIBRATION.layers) * rows
    for kv_bytes in np.linspace(lowest, FULL_BYTES * rows, 12).astype(int):
        plan = solve(CALIBRATION, kv_bytes=int(kv_bytes), batch_size=rows, dtype=dtype)
        taken = plan.kv_bytes(CALIBRATION.layers, rows, dtype)
        assert taken <= kv_bytes
        for spec, capacity, pair in zip(CALIBRATION.layers, plan.capacities, plan.layer_formats, strict=True):
            assert capacity == spec.effective_capacity(160) or taken + spec.slot_bytes(dtype, pair) * rows > kv_bytes
    said = {"kv_bytes": FULL_BYTES * rows, "batch_size": rows, "itemsize": 4}
    left_out = {"batch_size": rows == 1, "itemsize": dtype is None}
    assert plan.provenance.constraint == {name: value for name, value in said.items() if not left_out.get(name)}


def test_a_plan_says_how_it_was_made(tmp_path: Path) -> None:
    plan = solve(CALIBRATION, fraction=0.3, context=1000)
    made_by = plan.provenance
    assert (made_by.model, made_by.allocator, made_by.context) == ("a model", "calibrated", 1000)
    assert made_by.source == CALIBRATION.digest()
    assert made_by.expected_kl == CALIBRATION.expected_kl(plan.capacities, 1000, plan.formats)
    assert plan.policy == CALIBRATION.policy
    plan.save(tmp_path / "plan.json")
    assert Budgets.load(tmp_path / "plan.json") == plan
    assert solve(CALIBRATION, fraction=0.3, context=1000, allocator="calibrated") == plan


def test_capacities_are_multiples_of_sixteen_by_default() -> None:
    plan = solve(CALIBRATION, fraction=0.3)
    sizes = {spec.slot_bytes(formats=pair) for spec, pair in zip(CALIBRATION.layers, plan.layer_formats, strict=True)}
    whole = [capacity % 16 == 0 or capacity == 40 for capacity in plan.capacities]
    assert whole.count(False) <= len(sizes)
    assert min(solve(CALIBRATION, fraction=0.3, floor=32).capacities) >= 32


def test_only_formats_that_were_measured_are_chosen() -> None:
    for names, pairs in [
        (("int8",), {INT8}),
        (("model", "int4"), {None, INT4}),
        ((("int8", "int4"),), {("int8", "int4")}),
    ]:
        for fraction in (0.05, 0.3, 1.0):
            assert set(solve(made(names=names), fraction=fraction).layer_formats) <= pairs


def test_a_calibration_of_the_models_dtype_is_solved_as_ever() -> None:
    """Its whole plan, where it came from included, is the one without formats."""
    points = points_to_measure((None,), None, CALIBRATION.layers)
    kl = np.linspace(1, 0.1, 4 * len(points.shares), dtype=np.float32).reshape(1, 4, -1)
    fields: tuple[Any, ...] = (kl, points.shares, (160,), 4, Policy(eviction="append"), CALIBRATION.layers, "a model")
    for constraint in ({"fraction": 0.3}, {"total_tokens": 200}, {"kv_bytes": FULL_BYTES // 5}):
        plans = [solve(Calibration(*fields, *formats), **constraint) for formats in ((), ((None,) * len(points),))]  # type: ignore[arg-type]
        assert plans[0] == plans[1]
        assert plans[0].formats is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of"),
        (
            {"total_tokens": 300},
            "total_tokens cannot be asked of a calibration of several formats.*give kv_bytes, or the",
        ),
        ({"retention": 0.9}, "retention cannot be asked of a calibration of several formats"),
        ({"fraction": 0.0}, "fraction must be above 0 and at most 1; got 0.0"),
        ({"fraction": 1.5}, "fraction must be above 0 and at most 1; got 1.5"),
        ({"fraction": 1e-4}, "below one slot a layer, which takes"),
        ({"kv_bytes": 100}, "kv_bytes of 100 is below one slot a layer, which takes"),
        ({"kv_bytes": 1e6}, "kv_bytes must be a whole number"),
        ({"kv_bytes": 10**6, "batch_size": 0}, "batch_size must be"),
        ({"kv_bytes": 10**6, "dtype": "float16"}, "dtype must have its size"),
        ({"fraction": 0.5, "floor": 161}, "floor of 161 slots is above the context"),
        ({"fraction": 0.5, "context": 0}, "context must be"),
        ({"fraction": 0.5, "allocator": "uniform"}, "allocator 'uniform' shares tokens of one size and cannot choose"),
        ({"fraction": 0.5, "allocator": "ours"}, "unknown allocator 'ours'"),
    ],
)
def test_what_cannot_be_met_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        solve(CALIBRATION, **options)


@given(seed=st.integers(0, 2**32), fraction=st.floats(0.05, 1.0), multiple=st.sampled_from([1, 4, 16]))
@examples(20)
def test_permuted_layers_get_a_permuted_plan(seed: int, fraction: float, multiple: int) -> None:
    calibration, order = made((FULL,) * 5, seed=seed), np.random.default_rng(seed).permutation(5)
    turned = dataclasses.replace(calibration, kl=calibration.kl[:, order])
    plan, other = (solve(each, fraction=fraction, multiple=multiple) for each in (calibration, turned))
    assert other.capacities == tuple(plan.capacities[layer] for layer in order)
    assert other.layer_formats == tuple(plan.layer_formats[layer] for layer in order)
