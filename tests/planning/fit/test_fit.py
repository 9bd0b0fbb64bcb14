"""`fit`: the best plan under a limit is taken, it keeps the limit, and a run that was stopped goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ready_models import captured, model, remember_captures
from tiny_models import random_ids

import xkv_fx
from xkv_fx import BudgetError, Budgets, Fit, PromptError
from xkv_fx.planning.fit.clock import Clock
from xkv_fx.planning.measure.held_out import HeldOut
from xkv_fx.planning.measure.points import cost_by_head
from xkv_fx.planning.measure.verify import divergence_of_plans

NEW = 8
PROMPTS = [random_ids(1, 50 + index, seed=index)[0] for index in range(4)]
HELD_OUT = [ids[None] for ids in PROMPTS[1::2]]
FAST: dict[str, Any] = {"continuation": NEW, "multiple": 1, "scorers": ("snapkv",), "by": ("layer",)}


@pytest.fixture(autouse=True)
def _captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_captures(monkeypatch)


def fit(**options: Any) -> Fit:
    return xkv_fx.fit(model(), PROMPTS, **{**FAST, **options})


@pytest.fixture(scope="module")
def quarter() -> Fit:
    with pytest.MonkeyPatch.context() as patch:
        remember_captures(patch)
        return fit(fraction="25%")


def test_the_best_on_held_out_prompts_is_taken(quarter: Fit) -> None:
    layers = captured("llama", 2, 1).layers
    assert quarter.chosen.mean_kl == min(candidate.mean_kl for candidate in quarter.candidates)
    assert quarter.budgets.capacities == quarter.chosen.budgets.capacities
    assert isinstance(quarter.budgets, Budgets)
    names = [candidate.name for candidate in quarter.candidates]
    assert {"uniform, model", "uniform, int8", "capacities and formats by layer"} <= set(names)
    for candidate in quarter.candidates:
        (expected,) = divergence_of_plans(captured("llama", 2, 1), [candidate.budgets], HELD_OUT, NEW).mean(2).T
        np.testing.assert_allclose(candidate.kl, expected, atol=1e-9)
        assert candidate.kv_bytes == candidate.budgets.kv_bytes(layers) <= (quarter.report.limit or 0)


def test_the_report(quarter: Fit) -> None:
    report = quarter.report
    assert (report.measured, report.held_out, report.context) == (2, 2, max(map(len, PROMPTS)) - NEW)
    assert report.full_bytes == Budgets.full(2, report.context).kv_bytes(model())
    assert report.limit == report.full_bytes // 4
    assert list(report.curve) == sorted(report.curve)
    assert any("nats" in line for line in report.advice)
    held_out = quarter.budgets.provenance.held_out
    assert held_out is not None
    assert held_out["mean_kl"] == pytest.approx(quarter.chosen.mean_kl)
    assert quarter.chosen.name in str(quarter)
    assert quarter.to_dict()["candidates"][0]["chosen_over_this"] == [1.0, 1.0, 1.0]


def test_a_limit_holds_for_all_that_is_allocated() -> None:
    """With rows and room for generated tokens, whichever way to evict is best."""
    found = fit(memory=12_000, batch_size=2, max_new_tokens=10)
    assert {candidate.budgets.policy.eviction for candidate in found.candidates} == {"append", "ring"}
    llm = xkv_fx.transform(model(), found.budgets, batch_size=2, max_new_tokens=10, backend="eager")
    assert llm.kv_bytes == found.chosen.kv_bytes <= 12_000
    with pytest.raises(BudgetError, match="was solved for at most 12,000 bytes"):
        xkv_fx.transform(model(), found.budgets, batch_size=3, max_new_tokens=10, backend="eager")


def test_where_new_tokens_would_take_all_bytes_they_take_the_place_of_others() -> None:
    found = fit(fraction="50%", max_new_tokens=40, formats=("model",))
    assert found.budgets.policy.eviction == "ring"
    assert "capacities by layer, ring" in {candidate.name for candidate in found.candidates}
    (reason,) = found.report.left_out
    assert reason.startswith("capacities by layer, append were left out: kv_bytes of")
    assert "with the room for max_new_tokens" in reason


def test_a_bound_on_the_divergence() -> None:
    found = fit(kl=0.3)
    within = [one for one in found.candidates if one.mean_kl <= 0.3]
    assert found.chosen.kv_bytes == min(one.kv_bytes for one in within) < found.report.full_bytes
    assert found.chosen.mean_kl <= 0.3
    with pytest.raises(BudgetError, match="no plan that was tried keeps a held-out KL of 1e-09"):
        fit(kl=1e-9)


def test_plans_by_head_are_tried_too() -> None:
    found = fit(fraction=0.25, by=("layer", "head"), formats=("model", "int8"))
    by_head = next(one for one in found.candidates if one.name == "capacities and formats by head")
    assert any(isinstance(capacity, tuple) for capacity in by_head.budgets.capacities)
    assert by_head.kv_bytes <= (found.report.limit or 0)
    (expected,) = divergence_of_plans(captured("llama", 2, 1), [by_head.budgets], HELD_OUT, NEW).mean(2).T
    np.testing.assert_allclose(by_head.kl, expected, atol=1e-9)


def test_a_scorer_of_all_heads_leaves_plans_by_head_out() -> None:
    found = fit(fraction=0.25, by=("layer", "head"), formats=("model",), scorers=("tova",))
    assert any(
        "capacities by head were left out: " in line and "tova" in line.lower() for line in found.report.left_out
    )


def test_a_plan_that_is_served_otherwise_than_measured_claims_no_expectation() -> None:
    found = fit(memory=12_000, batch_size=2, max_new_tokens=10)
    expected = {
        one.budgets.policy.eviction: one.budgets.provenance.expected_kl
        for one in found.candidates
        if one.name.startswith("capacities")
    }
    assert expected["append"] is not None
    assert expected["ring"] is None


def test_a_limit_that_needs_no_eviction() -> None:
    found = fit(memory="1 MB")
    assert "needs no eviction" in found.report.advice[0]
    assert found.chosen.mean_kl == 0
    assert min(found.budgets.capacities) >= found.report.context
    assert found.budgets.kv_bytes(model()) <= 1_000_000
    llm = xkv_fx.transform(model(), found.budgets, backend="eager")
    ids = PROMPTS[0][None]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(llm.generate(ids, **options), model().generate(ids, **options))


def test_a_context_shorter_than_the_prompts_is_measured() -> None:
    """The limit holds that context, and evicts from the prompts that are held out."""
    found = fit(memory=Budgets.full(2, 24).kv_bytes(model()), context=20)
    assert "needs no eviction" in found.report.advice[0]
    assert found.chosen.mean_kl > 0


def test_a_second_turn_counts_beside_the_prompts() -> None:
    text, question = PROMPTS[0], random_ids(1, 5, seed=9)[0]
    found = fit(fraction=0.25, tasks=[(text, question)], formats=("model",))
    assert found.report.held_out == 3
    joined = torch.cat((text, question))[None]
    for candidate in found.candidates:
        (expected,) = divergence_of_plans(captured("llama", 2, 1), [candidate.budgets], [joined], 5).mean((1, 2))
        assert candidate.kl[0] == pytest.approx(expected, abs=1e-9)


def test_a_stopped_run_goes_on(tmp_path: Path, quarter: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("measuring"):
            raise Stopped

    with pytest.raises(Stopped):
        fit(fraction="25%", resume=tmp_path, progress=stop)
    measured: list[int] = []
    real = HeldOut._measured

    def counted(self: HeldOut, index: int, scorer: Any, plans: Any) -> Any:
        measured.append(len(plans))
        return real(self, index, scorer, plans)

    monkeypatch.setattr(HeldOut, "_measured", counted)
    again = fit(fraction="25%", resume=tmp_path)
    assert again.to_dict() == quarter.to_dict()
    once = sum(measured)
    assert fit(fraction="25%", resume=tmp_path).to_dict() == quarter.to_dict()
    assert sum(measured) == once > 0


def test_damaged_parts_are_measured_again(tmp_path: Path, quarter: Fit) -> None:
    fit(fraction="25%", resume=tmp_path)
    parts = [tmp_path / "decisions.json", *(tmp_path / "held_out").iterdir()]
    assert len(parts) == 3
    for part in parts:
        part.write_text("{")
    assert fit(fraction="25%", resume=tmp_path).to_dict() == quarter.to_dict()


def test_little_time(tmp_path: Path) -> None:
    """The first plan stands, what was left out is said, and a run that goes on decides as the first one did, though it
    finds results where the first one had to measure."""
    plans: list[str] = []
    options: dict[str, Any] = {"fraction": 0.25, "seconds": 1e-6, "resume": tmp_path, "by": ("layer", "head")}
    found = fit(**options, found=lambda plan, how: plans.append(how))
    assert plans
    assert (found.report.measured, found.report.held_out) == (1, 1)
    for line in ("1 of 2 held-out prompts were left out", "measured on 1 of 2 prompts", "by head were left out"):
        assert any(line in said for said in found.report.left_out)
    assert fit(**options).to_dict() == found.to_dict()


def test_a_run_that_goes_on_counts_the_time_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between layers and heads: what a prompt costs is not what reading its result costs."""

    class Stopped(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what == "measuring by layer" and (done, total) == (2, 2):
            raise Stopped

    options: dict[str, Any] = {"fraction": 0.25, "seconds": 1000, "resume": tmp_path, "by": ("layer", "head")}
    with pytest.raises(Stopped):
        fit(**options, progress=stop)
    asked: list[float] = []
    real = Clock.times_until

    def noted(self: Clock, share: float, seconds: float, most: int) -> int:
        asked.append(seconds)
        return real(self, share, seconds, most)

    monkeypatch.setattr(Clock, "times_until", noted)
    fit(**options)
    decided = json.loads((tmp_path / "decisions.json").read_text())["made"]
    cost = cost_by_head((None, ("int8", "int8"), ("int8", "int4"), ("int4", "int4")), captured("llama", 2, 1).layers)
    assert asked == [pytest.approx(cost * decided["milliseconds of a prompt"] / 1000)]


def test_each_found_plan_is_better(quarter: Fit) -> None:
    kl = {candidate.name: candidate.mean_kl for candidate in quarter.candidates}
    order: list[str] = []
    fit(fraction="25%", found=lambda plan, how: order.append(how))
    values = [kl[name] for name in order]
    assert values == sorted(values, reverse=True)
    assert order[-1] == quarter.chosen.name


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, BudgetError, "exactly one of kv_bytes, memory, fraction, kl; got none"),
        ({"memory": 1000, "kl": 0.1}, BudgetError, "got memory, kl"),
        ({"memory": 10}, BudgetError, "10 bytes are less than one slot a layer"),
        ({"fraction": 38.4}, BudgetError, 'did you mean 0.384, that is "38.4%"'),
        ({"kl": -1.0}, BudgetError, "kl must be a number above 0"),
        ({"memory": 1000, "seconds": 0}, BudgetError, "seconds must be a number above 0"),
        ({"memory": 1000, "by": ("row",)}, BudgetError, "'layer' and 'head'"),
        ({"memory": 1000, "scorers": ()}, BudgetError, "at least one"),
        ({"memory": 1000, "scorers": ("snapKV",)}, BudgetError, "snapkv"),
        ({"memory": 1000, "formats": ("int3",)}, BudgetError, "int3"),
        ({"memory": 1000, "batch_size": 0}, BudgetError, "batch_size must be"),
        ({"memory": 1000, "prompts": PROMPTS[:1]}, PromptError, "at least 2 are needed"),
        ({"memory": 1000, "prompts": [ids[:9] for ids in PROMPTS]}, PromptError, "at least 18 are needed"),
        ({"memory": 1000, "tasks": [PROMPTS[0]]}, PromptError, "pairs of a text"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    prompts = options.pop("prompts", PROMPTS)
    with pytest.raises(error, match=message):
        xkv_fx.fit(model(), prompts, **{**FAST, **options})
