"""Measuring by KV head, and solving for a capacity of each: heads stand where layers stand, and plans have tuples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from ready_models import captured, model, remember_captures
from tiny_models import random_ids

import xkv_fx
from xkv_fx import Budgets, Calibration, Policy, Profile
from xkv_fx.errors import BudgetError, FileFormatError
from xkv_fx.layers import LayerSpec
from xkv_fx.passes.pipeline import profile_pipeline, run_pipeline
from xkv_fx.planning.data.by_head import one_head_specs, whole_layers
from xkv_fx.planning.data.curves import retention_curve
from xkv_fx.planning.data.profile_data import MASS
from xkv_fx.planning.measure.continuation import cut_model, layer_plans, run_full
from xkv_fx.planning.measure.points import cost_by_head, points_to_measure
from xkv_fx.runtime.scorers import SnapKV, scorer_of

PROMPTS = [random_ids(1, length, seed=length)[0] for length in (40, 31)]
NEW = 6
SHARES = (0.25, 0.5)
APPEND = Policy(eviction="append")
GQA = LayerSpec(query_heads=4, kv_heads=2, key_dim=8, value_dim=8, itemsize=4)
SLIDING = dataclasses.replace(GQA, sliding_window=24)
WIDE = dataclasses.replace(GQA, query_heads=3, kv_heads=3, key_dim=16)
CODED = (("int8", "int8"),) * 3


@pytest.fixture(autouse=True)
def _captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_captures(monkeypatch)


def calibrate(**options: Any) -> Calibration:
    given_options: dict[str, Any] = {"grid": SHARES, "policy": APPEND, "continuation": NEW, "by": "head", **options}
    return xkv_fx.calibrate(model(), PROMPTS, **given_options)


def synthetic(layers: tuple[LayerSpec, ...], kl: NDArray[Any], **fields: Any) -> Calibration:
    """By head, of one prompt of 64 tokens."""
    made: dict[str, Any] = {"grid": SHARES, "heads": tuple(spec.kv_heads for spec in layers), **fields}
    return Calibration(
        kl.astype(np.float32)[None], made.pop("grid"), (64,), 4, APPEND, one_head_specs(layers), "model", **made
    )


def test_each_head_is_cut_alone() -> None:
    calibration = calibrate()
    layers = captured("llama", 2, 1).layers
    assert calibration.heads == (2, 2)
    assert calibration.model_layers == layers
    assert calibration.kl.shape == (2, 4, 2)
    full = run_full(cut_model(captured("llama", 2, 1)), SnapKV(), PROMPTS[0][None], NEW)
    tokens = len(PROMPTS[0]) - NEW
    for place in range(4):
        capacities = [tokens] * 4
        capacities[place] = round(SHARES[0] * tokens)
        plan = Budgets((tuple(capacities[:2]), tuple(capacities[2:])), APPEND)
        expected = float(full.divergence([layer_plans(plan, layers, NEW)]).mean())
        assert calibration.kl[0, place, 0] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    calibration = calibrate(formats=("model", "int8"))
    calibration.save(tmp_path / "by_head")
    loaded = Calibration.load(tmp_path / "by_head")
    assert loaded == calibration
    assert loaded.heads == (2, 2)
    assert "4 KV heads in 2 layers" in str(loaded)
    plan = xkv_fx.solve(loaded, fraction=0.4, multiple=1)
    assert plan.mean_keys is not None
    assert all(mean is None or mean.kv_heads == 2 for mean in plan.mean_keys)
    assert plan.kv_bytes(captured("llama", 2, 1).layers) == plan.provenance.kv_bytes
    plan.save(tmp_path / "plan.json")
    assert Budgets.load(tmp_path / "plan.json") == plan
    llm = xkv_fx.transform(model(), plan, backend="eager", max_new_tokens=4)
    assert llm.kv_bytes == plan.kv_bytes(llm, max_new_tokens=4)


def test_heads_are_resumed_and_layers_are_not_taken_for_them(tmp_path: Path) -> None:
    first = calibrate(resume=tmp_path)
    assert calibrate(resume=tmp_path) == first
    assert calibrate(resume=tmp_path, by="layer").heads is None


def test_a_file_of_other_heads_is_refused(tmp_path: Path) -> None:
    kl = np.ones((4, 2))
    for heads, message in (((4,), "differ"), ((1, 2), "heads says 3 KV heads"), ((0, 4), "at least 1")):
        layers = (GQA, SLIDING)
        with pytest.raises(BudgetError, match=message):
            synthetic(layers, kl, heads=heads)
    assert whole_layers(one_head_specs((GQA, WIDE)), (2, 3)) == (GQA, WIDE)


def test_formats_of_heads_are_chosen_together_with_capacities() -> None:
    kl = np.array([[0.5, 0.2, 0.001], [0.002, 0.001, 0.3]] * 2)
    formats = (None, None, *CODED)
    grid = (0.25, 0.5, 0.25, 0.5, 1.0)
    points = np.concatenate((kl[:, :2], kl[:, :1], kl[:, 1:]), 1)
    calibration = synthetic((GQA, GQA), points, grid=grid, formats=formats)
    plan = xkv_fx.solve(calibration, fraction=0.4, multiple=4)
    assert plan.by_head
    assert plan.kv_bytes((GQA, GQA)) <= 0.4 * 64 * 2 * GQA.slot_bytes()


@st.composite
def calibrations(draw: st.DrawFn) -> tuple[tuple[LayerSpec, ...], Calibration]:
    layers = tuple(draw(st.lists(st.sampled_from([GQA, SLIDING, WIDE]), min_size=1, max_size=3)))
    count = sum(spec.kv_heads for spec in layers)
    values = st.lists(st.floats(0, 1, width=32), min_size=2 * count, max_size=2 * count)
    return layers, synthetic(layers, np.array(draw(values)).reshape(count, 2))


@settings(max_examples=60)
@given(calibrations(), st.integers(0, 100), st.sampled_from([1, 4]))
def test_bytes_are_used_up_and_never_exceeded(made: Any, percent: int, multiple: int) -> None:
    layers, calibration = made
    full = Budgets.full(len(layers), 64).kv_bytes(layers)
    least = Budgets((1,) * len(layers)).kv_bytes(layers)
    limit = least + (full - least) * percent // 100
    plan = xkv_fx.solve(calibration, kv_bytes=limit, multiple=multiple)
    taken = plan.kv_bytes(layers)
    assert taken == plan.provenance.kv_bytes
    dearest = max(spec.slot_bytes() // spec.kv_heads for spec in layers)
    assert limit - dearest < taken <= limit
    assert len(plan.capacities) == len(layers)
    assert plan.provenance.sliding_windows == (
        tuple(spec.sliding_window for spec in layers) if SLIDING in layers else None
    )


@settings(max_examples=40)
@given(calibrations(), st.integers(1, 60), st.integers(0, 4))
def test_plans_of_equal_slots_are_nested(made: Any, tokens: int, more: int) -> None:
    layers, calibration = made
    if len(set(layers)) > 1 or layers[0] is SLIDING:
        return
    small, large = (xkv_fx.solve(calibration, total_tokens=n * len(layers)) for n in (tokens, min(64, tokens + more)))
    assert small.total_tokens == tokens * len(layers)
    assert all(a <= b for a, b in zip(small.every_capacity, large.every_capacity, strict=True))


def test_a_head_that_does_not_matter_gets_one_block() -> None:
    """Nothing is shared alike by heads, which by layer a quarter is."""
    kl = np.array([[2.0, 1.0], [0.0, 0.0], [2.0, 1.0], [0.0, 0.0]])
    plan = xkv_fx.solve(synthetic((GQA, GQA), kl), fraction=0.25, multiple=1)
    assert plan.capacities == ((31, 1), (31, 1))


def test_one_head_a_layer_has_plain_numbers() -> None:
    one = dataclasses.replace(GQA, kv_heads=1)
    plan = xkv_fx.solve(synthetic((one, GQA), np.array([[2.0, 1.0], [1.0, 0.5], [0.1, 0.0]])), fraction=0.3)
    assert isinstance(plan.capacities[0], int)
    assert isinstance(plan.capacities[1], tuple)
    with pytest.raises(BudgetError, match="total_tokens cannot be asked of layers with different numbers of KV heads"):
        xkv_fx.solve(synthetic((one, GQA), np.ones((3, 2))), total_tokens=20)


def test_more_heads_are_measured_at_fewer_points() -> None:
    def of(kv_heads: int, formats: Any = (None,)) -> int:
        layer = dataclasses.replace(GQA, query_heads=kv_heads, kv_heads=kv_heads)
        return kv_heads * len(points_to_measure(formats, None, [layer], "head"))

    by_layer = len(points_to_measure((None,), None, [GQA]))
    assert [of(count) for count in (1, 2, 3, 4)] == [by_layer, 12, 12, 12]
    pairs = (None, ("int8", "int8"), ("int8", "int4"), ("int4", "int4"))
    assert of(3, pairs) <= 1.5 * len(points_to_measure(pairs, None, [GQA]))
    assert cost_by_head((None,), (WIDE, WIDE)) == 1.5
    assert cost_by_head(pairs, (GQA, WIDE)) == 1.25, "five heads at half of the points of two layers"


@pytest.mark.parametrize("call", [xkv_fx.calibrate, xkv_fx.profile])
def test_by_something_else_is_refused_before_the_model_is_captured(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkv_fx.hf.capture.capture", None)
    with pytest.raises(BudgetError, match="by must be 'layer' or 'head'; got 'heads'"):
        call(model(), PROMPTS, policy=APPEND, by="heads")


def test_profiles_have_a_curve_and_a_mass_for_each_head(tmp_path: Path) -> None:
    policy = Policy("h2o", eviction="append")
    profile = xkv_fx.profile(model(), PROMPTS[:1], policy=policy, by="head")
    source = captured("llama", 2, 1)
    graph = run_pipeline(source.graph("prompt"), profile_pipeline(scorer_of(policy), (), source.layers)).module
    ids = PROMPTS[0][None]
    with torch.no_grad():
        scores = graph(ids, torch.arange(ids.shape[1])[None], torch.ones_like(ids, dtype=torch.bool))
    heads = [head for layer in scores for head in layer[0].numpy()]
    for curve, head in zip(profile.curves[0], heads, strict=True):
        np.testing.assert_allclose(curve, retention_curve(head[None], policy), atol=1e-6)
    mass = np.array([head.sum() for head in heads])
    np.testing.assert_allclose(profile.layer_means[MASS], mass / mass.mean(), rtol=1e-5)
    plan = xkv_fx.solve(profile, fraction=0.4, multiple=1)
    assert plan.by_head
    even = profile.objective(40)[:, 16].mean()
    assert (plan.provenance.expected_retention or 0) >= even - 1e-9
    profile.save(tmp_path / "profile")
    assert Profile.load(tmp_path / "profile") == profile
    with pytest.raises(BudgetError, match="'pyramid' is made for layers"):
        xkv_fx.solve(profile, fraction=0.4, allocator="pyramid")


def test_statistics_are_of_layers() -> None:
    with pytest.raises(BudgetError, match="preference are of layers"):
        xkv_fx.profile(model(), PROMPTS, by="head", statistics=("preference",))


def test_plans_by_head_are_verified_and_fitted() -> None:
    calibration = calibrate()
    plan = xkv_fx.solve(calibration, fraction=0.4, multiple=1)
    report = xkv_fx.verify(model(), plan, PROMPTS, continuation=NEW)
    layers = captured("llama", 2, 1).layers
    assert len(report.kl) == 2
    assert report.uniform_plan(plan).kv_bytes(layers) <= plan.kv_bytes(layers)
    fitted = xkv_fx.fit_quality(model(), calibration, PROMPTS, kl=0.5, continuation=NEW, multiple=1)
    assert fitted.by_head
    assert fitted.provenance.held_out is not None


def test_older_readers_are_not_misled(tmp_path: Path) -> None:
    """A file by head that says it is of an older version is refused."""
    synthetic((GQA,), np.ones((2, 2))).save(tmp_path / "by_head")
    with safetensors.safe_open(tmp_path / "by_head", framework="np") as file:
        header = json.loads(file.metadata()["xkv_fx"])
        kl = file.get_tensor("kl")
    header["version"] = 1
    safetensors.numpy.save_file({"kl": kl}, tmp_path / "changed", {"xkv_fx": json.dumps(header)})
    with pytest.raises(FileFormatError, match="unknown fields"):
        Calibration.load(tmp_path / "changed")
