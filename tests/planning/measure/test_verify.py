"""Held-out reports: what is compared with what, how certain it is, and the smallest plan that holds a bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ready_models import captured, model, remember_captures
from tiny_models import random_ids

import xkv_fx
from xkv_fx import Budgets, Calibration, LayerSpec, Policy, Verification
from xkv_fx.budgets import Provenance
from xkv_fx.errors import BudgetError, ModelMismatchError, PromptError
from xkv_fx.planning.measure.bootstrap import Estimate
from xkv_fx.planning.measure.continuation import cut_model, layer_plans, run_full
from xkv_fx.planning.measure.verify import SINGLE_FORMATS, SingleFormat, single_formats_like, uniform_like
from xkv_fx.runtime.scorers import SnapKV

PROMPTS = [random_ids(1, 40, seed=seed)[0] for seed in range(4)]
NEW = 6
APPEND = Policy(eviction="append")
SKEWED = Budgets((20, 6), APPEND)


@pytest.fixture(autouse=True)
def _captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_captures(monkeypatch)


def test_a_plan_beside_uniform_at_equal_bytes() -> None:
    report = xkv_fx.verify(model(), SKEWED, PROMPTS, continuation=NEW)
    assert report.uniform == (13, 13)
    layers = captured("llama", 2, 1).layers
    cut = cut_model(captured("llama", 2, 1))
    for prompt, ids in enumerate(PROMPTS):
        run = run_full(cut, SnapKV(), ids[None], NEW)
        ours, even = (layer_plans(Budgets(c, APPEND), layers, NEW) for c in (SKEWED.capacities, (13, 13)))
        expected = run.divergence([ours, even]).mean(1)
        assert report.kl[prompt] == pytest.approx(float(expected[0]), rel=1e-3)
        assert report.uniform_kl[prompt] == pytest.approx(float(expected[1]), rel=1e-3)
    assert report.ratio.value == pytest.approx(np.mean(report.kl) / np.mean(report.uniform_kl))


def test_several_plans_share_one_pass_and_report_alike() -> None:
    others = Budgets((6, 20), APPEND)
    reports = xkv_fx.verify(model(), (SKEWED, others), PROMPTS, continuation=NEW)
    alone = xkv_fx.verify(model(), SKEWED, PROMPTS, continuation=NEW)
    np.testing.assert_allclose(reports[0].kl, alone.kl, rtol=1e-3)
    assert reports[1].uniform == alone.uniform
    assert len(reports) == 2


def test_a_uniform_plan_is_exactly_as_good_as_itself() -> None:
    report = xkv_fx.verify(model(), Budgets.uniform(2, 12, APPEND), PROMPTS, continuation=NEW)
    assert report.ratio == Estimate(1.0, 1.0, 1.0)
    assert not report.better


def test_the_report_is_stored_in_the_plan(tmp_path: Any) -> None:
    report = xkv_fx.verify(model(), SKEWED, PROMPTS, continuation=NEW)
    stored = report.stored_in(SKEWED)
    stored.save(tmp_path / "plan.json")
    assert Budgets.load(tmp_path / "plan.json") == stored
    held_out = stored.provenance.held_out
    assert held_out is not None
    assert held_out["prompts"] == 4
    assert held_out["ratio"] == report.ratio.value
    even = report.uniform_plan(SKEWED)
    assert even.capacities == (13, 13)
    assert even.provenance.allocator == "uniform"


def test_uniform_takes_no_more_bytes_whatever_the_layers_are() -> None:
    layers = (LayerSpec(4, 2, 8, 8, 4), LayerSpec(4, 4, 16, 16, 4), LayerSpec(4, 2, 8, 8, 4, sliding_window=8))
    plan = Budgets((40, 10, 30), APPEND)
    even = uniform_like(plan, layers)
    assert even.kv_bytes(layers) <= plan.kv_bytes(layers)
    assert even.capacities[2] <= 8
    more = Budgets(tuple(c + 1 for c in even.capacities), APPEND)
    assert more.kv_bytes(layers) > plan.kv_bytes(layers)


# Formats

INT8, INT4 = ("int8", "int8"), ("int4", "int4")


def test_a_plan_beside_the_best_single_format_at_equal_bytes() -> None:
    budgets = Budgets((34, 20), APPEND, formats=(INT8, None))
    layers = captured("llama", 2, 1).layers
    report = xkv_fx.verify(model(), budgets, PROMPTS, continuation=NEW)
    assert report.uniform == (16, 16)
    assert 32 * 128 <= budgets.kv_bytes(layers) == 34 * 2 * (12 + 12) + 20 * 128 < 33 * 128
    cut, kl = cut_model(captured("llama", 2, 1)), []
    for ids in PROMPTS:
        run = run_full(cut, SnapKV(), ids[None], NEW)
        plans = [budgets, *(Budgets((34, 34), APPEND, formats=(pair,) * 2) for pair in SINGLE_FORMATS)]
        kl.append(run.divergence([layer_plans(plan, layers, NEW) for plan in plans]).mean(1).numpy())
    ours, *alike = np.array(kl).T
    np.testing.assert_allclose(report.kl, ours, rtol=1e-3)
    assert report.single is not None
    best = min(range(3), key=lambda at: float(alike[at].mean()))
    assert (report.single.formats, report.single.capacities) == (SINGLE_FORMATS[best], (34, 34))
    np.testing.assert_allclose(report.single.kl, alike[best], rtol=1e-2, atol=1e-9)
    assert report.single.ratio.value == pytest.approx(ours.mean() / alike[best].mean(), rel=1e-2)
    assert report.best == "single format", "what evicts nothing strays by far less"
    other = report.single_format_plan(budgets)
    assert (other.capacities, other.formats) == ((34, 34), (report.single.formats,) * 2)
    assert other == report.rival_plan(budgets)
    assert other.provenance.held_out is not None
    assert other.provenance.held_out["best"] == "single format"
    assert report.uniform_plan(budgets).formats is None


def test_bytes_are_those_of_the_dtype_that_a_plan_was_solved_for() -> None:
    """A calibration and its verification may compute in float32 for a model that is served in bfloat16."""
    calibration = xkv_fx.calibrate(model(), PROMPTS, policy=APPEND, continuation=NEW, formats=("model", "int8"))
    plan = xkv_fx.solve(calibration, kv_bytes=3000, dtype=torch.bfloat16)
    report = xkv_fx.verify(model(), plan, PROMPTS, continuation=NEW)
    taken = plan.kv_bytes(captured("llama", 2, 1).layers, dtype=torch.bfloat16)
    assert 3000 - 64 < taken <= 3000
    assert sum(report.uniform) == taken // 64, "2 heads x (8 + 8) elements of 2 bytes"
    assert report.single is not None
    assert report.single.capacities == (34, 34), "2,992 bytes hold all tokens in int8/int4"


def test_a_single_format_keeps_equal_capacities_where_not_every_token_fits() -> None:
    layers = (LayerSpec(4, 2, 64, 64, 2), LayerSpec(4, 2, 64, 64, 2, sliding_window=8))
    plan = Budgets((40, 20), APPEND, Provenance(context=1000))
    like = single_formats_like(plan, layers, 30)
    assert set(like) == set(SINGLE_FORMATS)
    for pair, alike in like.items():
        assert alike.formats == (pair,) * 2
        assert alike.capacities[1] == 8
        assert 48 * 512 - 2 * 136 < alike.kv_bytes(layers) <= 48 * 512
        assert single_formats_like(plan, layers, 300)[pair].capacities == alike.capacities
    assert single_formats_like(Budgets((1, 1), APPEND, formats=(INT4, INT4)), layers, 30).keys() == {INT4}
    odd = (LayerSpec(4, 2, 64, 20, 2), LayerSpec(4, 1, 24, 0, 2))
    assert single_formats_like(Budgets((4, 4), APPEND), odd, 30) == {}


def test_a_single_format_is_exactly_as_good_as_itself() -> None:
    report = xkv_fx.verify(model(), Budgets((34, 34), APPEND, formats=(INT4, INT4)), PROMPTS, continuation=NEW)
    assert report.single is not None
    same = report.single.formats == INT4
    assert (report.single.ratio == Estimate(1.0, 1.0, 1.0)) == same
    assert report.best in (None, "single format")
    assert report.better


def test_the_best_of_three_is_better_than_both_by_their_intervals() -> None:
    def best(plan: float, uniform: float, single: float | None, noise: float = 0.0) -> str | None:
        ours, even, alike = (np.array([1 - noise, 1 + noise]) * (each or 1.0) for each in (plan, uniform, single))
        one = SingleFormat(INT8, (4, 4), tuple(alike[::-1]), Estimate(1.0, 1.0, 1.0))
        kept = None if single is None else one
        return Verification(tuple(ours), tuple(even), (4, 4), Estimate(1.0, 1.0, 1.0), NEW, kept).best

    assert best(1.0, 2.0, 3.0) == "plan"
    assert best(2.0, 1.0, 3.0) == "uniform"
    assert best(2.0, 3.0, 1.0) == "single format"
    assert best(1.0, 2.0, None) == "plan"
    assert best(2.0, 1.0, None) == "uniform"
    assert best(1.0, 1.0, 3.0) is None
    assert best(1.0, 2.0, 1.1, noise=0.5) is None


def test_the_fewest_bytes_of_several_formats_that_hold_a_bound() -> None:
    options: dict[str, Any] = {"continuation": NEW, "multiple": 1, "resolution": 0.1}
    calibration = xkv_fx.calibrate(
        model(), PROMPTS[:1], (0.3, 0.7), APPEND, continuation=NEW, formats=("model", "int8", "int4")
    )
    layers = calibration.layers
    prompts = PROMPTS[:2]
    found = xkv_fx.fit_quality(model(), calibration, prompts, kl=0.05, **options)
    assert found.provenance.constraint == {"kl": 0.05}
    assert found.provenance.held_out is not None
    assert found.provenance.held_out["mean_kl"] <= 0.05
    step = int(0.1 * 2 * 34 * layers[0].slot_bytes())
    fewer = xkv_fx.solve(calibration, kv_bytes=found.kv_bytes(layers) - step, multiple=1)
    assert np.mean(xkv_fx.verify(model(), fewer, prompts, continuation=NEW).kl) > 0.05
    stored = xkv_fx.calibrate(model(), PROMPTS[:1], (0.3, 0.7), APPEND, continuation=NEW, formats=("int4",))
    with pytest.raises(BudgetError, match="and int4 is not exact; ask for a larger kl"):
        xkv_fx.fit_quality(model(), stored, prompts, kl=1e-9, **options)


@pytest.mark.parametrize(
    ("budgets", "options", "error", "message"),
    [
        (Budgets.full(2, 100), {}, BudgetError, "never evicts"),
        (Budgets((4, 4, 4), APPEND), {}, BudgetError, "3 capacities"),
        (Budgets((4, 4), APPEND, Provenance(model="another")), {}, ModelMismatchError, "made for the model"),
        ("plan", {}, BudgetError, "must be an xkv_fx"),
        ((), {}, BudgetError, "must be an xkv_fx"),
        ((SKEWED, Budgets(SKEWED.capacities)), {}, BudgetError, "one policy"),
        (SKEWED, {"continuation": 0}, BudgetError, "continuation must be"),
        (SKEWED, {"continuation": 39}, PromptError, "too few"),
    ],
)
def test_bad_input_is_refused(budgets: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        xkv_fx.verify(model(), budgets, PROMPTS, **{"continuation": NEW, **options})


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    with pytest.MonkeyPatch.context() as patch:
        remember_captures(patch)
        return xkv_fx.calibrate(
            model(), [random_ids(1, 40, seed=9)[0]], grid=(0.2, 0.4, 0.7), policy=APPEND, continuation=NEW
        )


def test_the_smallest_plan_that_holds_a_bound(calibration: Calibration) -> None:
    options: dict[str, Any] = {"continuation": NEW, "multiple": 1, "resolution": 0.05}
    found = xkv_fx.fit_quality(model(), calibration, PROMPTS, kl=0.3, **options)
    assert found.provenance.constraint == {"kl": 0.3}
    held_out = found.provenance.held_out
    assert held_out is not None
    assert held_out["mean_kl"] <= 0.3
    report = xkv_fx.verify(model(), found, PROMPTS, continuation=NEW)
    assert np.mean(report.kl) == pytest.approx(held_out["mean_kl"], rel=1e-3)
    stricter = xkv_fx.fit_quality(model(), calibration, PROMPTS, kl=0.1, **options)
    assert stricter.total_tokens > found.total_tokens
    step = max(1, int(0.05 * 2 * 34))
    fewer = xkv_fx.solve(calibration, total_tokens=found.total_tokens - step, multiple=1)
    assert np.mean(xkv_fx.verify(model(), fewer, PROMPTS, continuation=NEW).kl) > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": 0.0}, "kl must be"),
        ({"kl": float("nan")}, "kl must be"),
        ({"kl": True}, "kl must be"),
        ({"resolution": 0.0}, "resolution must be"),
    ],
)
def test_bad_bounds_are_refused(calibration: Calibration, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        xkv_fx.fit_quality(model(), calibration, PROMPTS, continuation=NEW, **options)


def test_fit_quality_takes_a_calibration_of_this_model_only(calibration: Calibration) -> None:
    with pytest.raises(BudgetError, match="takes an xkv_fx"):
        xkv_fx.fit_quality(model(), SKEWED, PROMPTS)  # type: ignore[arg-type]
    other = Calibration(**{**vars(calibration), "model": "another"})
    with pytest.raises(ModelMismatchError, match="'another'"):
        xkv_fx.fit_quality(model(), other, PROMPTS, continuation=NEW)


def test_a_bound_that_even_full_capacities_break_is_refused() -> None:
    with pytest.MonkeyPatch.context() as patch:
        remember_captures(patch)
        ring = xkv_fx.calibrate(
            model(), [torch.arange(3, 43)], grid=(0.2, 0.4), policy=Policy(eviction="ring"), continuation=NEW
        )
    with pytest.raises(BudgetError, match="push out others"):
        xkv_fx.fit_quality(model(), ring, PROMPTS, kl=1e-9, continuation=NEW)


def test_reports_say_it_in_words() -> None:
    report = Verification((1.0, 3.0), (2.0, 6.0), (4, 4), Estimate(0.5, 0.45, 0.55), NEW)
    assert report.better
    assert "-50% (-55% to -45%, 95 %, 2 prompts)" in str(report)
    single = SingleFormat(("int8", "int4"), (64, 40), (4.0, 12.0), Estimate(0.25, 0.2, 0.3))
    report = Verification((1.0, 3.0), (2.0, 6.0), (4, 4), Estimate(0.5, 0.45, 0.55), NEW, single)
    _, line = str(report).split("\n")
    assert line.startswith("against 8.0000 with all layers in int8/int4, 40 to 64 tokens each: -75% (-80% to -70%); ")
    assert line.endswith("best of the three: the plan")
