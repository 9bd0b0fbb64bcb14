"""Plans put to tasks on a tiny model: what is compared, what serving would answer, and what an interruption leaves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hybrid_models import transformed as hybrid
from old_versions import FP8, needs_fp8
from ready_models import remember_programs
from tiny_models import llama, random_ids
from transformers import PreTrainedModel
from word_tokenizer import WordTokenizer

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.budgets import Provenance
from xkv_fx.errors import (
    BackendError,
    BudgetError,
    FileFormatError,
    ModelMismatchError,
    PromptError,
    UnsupportedModelError,
)
from xkv_fx.evaluation.quality.answering import BudgetedReader
from xkv_fx.evaluation.quality.candidates import (
    Candidate,
    bits_per_element,
    candidates_of_bytes,
    candidates_of_fractions,
    candidates_of_plans,
    check_equal_bytes,
    formats_of,
)
from xkv_fx.evaluation.quality.evaluate import EvaluationSettings, evaluate
from xkv_fx.evaluation.quality.parts import remove_parts
from xkv_fx.evaluation.quality.quantized import QUANTIZED, Quantized, cache_bytes, planned_bytes
from xkv_fx.evaluation.quality.results import CONTINUATION_TASK, FULL, Evaluation, Row, smallest_sizes
from xkv_fx.evaluation.quality.shared_prefill import Recorder, can_record
from xkv_fx.evaluation.texts import source_code
from xkv_fx.layers import LayerSpec, with_itemsize
from xkv_fx.planning.data.by_head import one_head_specs
from xkv_fx.planning.solve.constraints import full_bytes

VOCABULARY = 500
LENGTH = 160
SETTINGS = EvaluationSettings(("needle_single", CONTINUATION_TASK), length=LENGTH, count=2)


@dataclasses.dataclass(frozen=True)
class Ready:
    model: PreTrainedModel
    tokenizer: WordTokenizer
    llm: Any

    def plans(self, *fractions: float, **options: Any) -> tuple[Candidate, ...]:
        return candidates_of_fractions(self.llm.layers, LENGTH, fractions, **options)

    def evaluate(self, candidates: Any, settings: EvaluationSettings = SETTINGS, **options: Any) -> Evaluation:
        return evaluate(self.model, self.tokenizer, candidates, settings, llm=self.llm, **options)


@pytest.fixture(scope="module", autouse=True)
def _little_work() -> Iterator[None]:
    """All of it takes seconds in a tokenizer of plain Python, and so does lowering each plan again in each test."""
    with pytest.MonkeyPatch.context() as patch:
        remember_programs(patch)
        patch.setattr("xkv_fx.evaluation.quality.evaluate.source_code", lambda: source_code()[:60_000])
        yield


@pytest.fixture(scope="module")
def ready(_little_work: None) -> Ready:
    model = llama(2, vocab_size=VOCABULARY)
    llm = xkv_fx.transform(model, Budgets.full(2, LENGTH), backend="eager", check=False)
    return Ready(model, WordTokenizer(VOCABULARY), llm)


@pytest.fixture
def _captured_once(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the public calls take the model as it was captured."""
    monkeypatch.setattr("xkv_fx.hf.capture.capture", lambda *args, **options: ready.llm.program.graphs.captured)


@pytest.fixture(scope="module")
def found(ready: Ready) -> Evaluation:
    return ready.evaluate(ready.plans(0.25, 1.0), quantized=FP8)


def rows(evaluation: Evaluation, task: str = "needle_single", form: str = "inside") -> dict[tuple[str, str], Row]:
    return {(row.name, row.size): row for row in evaluation.rows if (row.task, row.form) == (task, form)}


# What is asked


@pytest.mark.parametrize("form", ["inside", "after"])
def test_full_budgets_answer_as_transformers_own_generate(ready: Ready, found: Evaluation, form: str) -> None:
    row = rows(found, form=form)[FULL, FULL]
    for instance, text in zip(SETTINGS.instances("needle_single", ready.tokenizer), row.texts, strict=True):
        output = ready.model.generate(instance.prompt, max_new_tokens=instance.new_tokens, do_sample=False)
        assert text == ready.tokenizer.decode(output[0, LENGTH:].tolist())


@pytest.mark.parametrize("form", ["inside", "after"])
def test_plans_answer_as_their_own_generate(ready: Ready, found: Evaluation, form: str) -> None:
    row = rows(found, form=form)["uniform", "25.0%"]
    llm = ready.llm.with_budgets(Budgets.uniform(2, LENGTH // 4))
    for instance, text in zip(SETTINGS.instances("needle_single", ready.tokenizer), row.texts, strict=True):
        session = llm.new_session()
        if form == "after":
            llm(instance.context, past_key_values=session, logits_to_keep=1)
        options = {"max_new_tokens": instance.new_tokens, "do_sample": False, "past_key_values": session}
        output = llm.generate(instance.prompt, **options)
        assert text == ready.tokenizer.decode(output[0, LENGTH:].tolist())


def test_the_forms_differ_once_tokens_are_evicted(found: Evaluation) -> None:
    inside, after = rows(found), rows(found, form="after")
    assert inside[FULL, FULL].texts == after[FULL, FULL].texts
    assert inside["uniform", "25.0%"].texts != after["uniform", "25.0%"].texts


def test_text_is_compared_with_the_full_cache(found: Evaluation) -> None:
    by_plan = rows(found, CONTINUATION_TASK)
    assert set(by_plan) == {(FULL, FULL), ("uniform", "25.0%"), ("uniform", "100.0%"), *((name, name) for name in FP8)}
    assert by_plan[FULL, FULL].values == {"kl": (0.0, 0.0), "nll_change": (0.0, 0.0), "agreement": (1.0, 1.0)}
    assert all(by_plan[name, name].mean < by_plan["uniform", "25.0%"].mean for name in FP8)


@pytest.mark.usefixtures("_captured_once")
def test_divergence_is_what_verify_measures(ready: Ready, found: Evaluation) -> None:
    """`verify` leaves out the logits after the prompt's last token and counts those after the continuation's last."""
    ids = SETTINGS.instances(CONTINUATION_TASK, ready.tokenizer)[0].prompt
    plan = Budgets.uniform(2, LENGTH // 4)
    llm, full = ready.llm.with_budgets(plan), ready.llm.with_budgets(Budgets.full(2, ids.shape[1]))
    reader, exact = BudgetedReader(llm), BudgetedReader(full)
    logits = [(one.read(ids[:, :LENGTH]), one) for one in (reader, exact)]
    total = []
    for token in torch.split(ids[:, LENGTH:], 1, dim=1):
        ours, theirs = (one.step(token) for _, one in logits)
        p, q = (torch.log_softmax(part.double(), -1) for part in (theirs, ours))
        total.append(float((p.exp() * (p - q)).sum()))
    report = xkv_fx.verify(ready.model, plan, [ids], continuation=ids.shape[1] - LENGTH)
    assert report.kl[0] == pytest.approx(sum(total) / len(total), rel=1e-3)
    kept = rows(found, CONTINUATION_TASK)["uniform", "25.0%"].values["kl"][0]
    assert kept == pytest.approx(sum(total[:-1]) / len(total), rel=1e-3), "the first token's logits are the same"


# One prefill for all


@pytest.mark.parametrize(
    ("capacities", "policy"),
    [
        ((20, 9), Policy()),
        ((20, 9), Policy("h2o", sinks=2)),
        ((20, 9), Policy(eviction="append")),
        ((20, 9), Policy("tova", eviction="scored")),
        ((60, 60), Policy(eviction="none")),
        (((20, 7), 9), Policy()),
        ((9, (30, 12)), Policy(eviction="scored")),
    ],
    ids=lambda value: f"{value.scorer}-{value.eviction}" if isinstance(value, Policy) else str(value),
)
def test_a_recorded_prompt_leaves_what_reading_it_leaves(
    ready: Ready, capacities: tuple[Any, ...], policy: Policy
) -> None:
    llm = ready.llm.with_budgets(Budgets(capacities, policy), max_new_tokens=4)
    ids = random_ids(1, 50)
    itself, filled = BudgetedReader(llm), BudgetedReader(llm)
    filled.read(random_ids(1, 30, seed=1))  # what was there before does not matter
    expected = itself.read(ids)
    logits = Recorder(ready.llm, policy, 60).read(ids).into(filled)
    assert torch.equal(logits, expected)
    for ours, theirs in zip(filled.session.session.state.tensors, itself.session.session.state.tensors, strict=True):
        assert torch.equal(ours, theirs)
    assert filled.session.get_seq_length() == 50
    assert torch.equal(filled.step(ids[:, :1]), itself.step(ids[:, :1]))


def test_a_prompt_that_a_scorer_reads_again_is_recorded_too(ready: Ready) -> None:
    policy = Policy("reconstruction", {"instruction": "3 4"}, eviction="append", recent=2)
    llm = ready.llm.with_budgets(Budgets(((20, 7), (9, 30)), policy), max_new_tokens=4)
    ids = random_ids(1, 50)
    itself, filled = BudgetedReader(llm), BudgetedReader(llm)
    expected = itself.read(ids)
    torch.testing.assert_close(Recorder(ready.llm, policy, 60).read(ids).into(filled), expected)
    for ours, theirs in zip(filled.session.session.state.tensors, itself.session.session.state.tensors, strict=True):
        torch.testing.assert_close(ours, theirs)  # positions are whole numbers, and so the same
    torch.testing.assert_close(filled.step(ids[:, :1]), itself.step(ids[:, :1]))


def test_a_hybrid_is_read_by_each_plan() -> None:
    """A recurrent state is not among what a recorder holds."""
    assert not can_record(hybrid("lfm2"), Policy(), 60)


def test_a_graph_that_cannot_be_cut_is_read_by_each_plan(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> Any:
        raise UnsupportedModelError("tokens meet outside attention")

    monkeypatch.setattr("xkv_fx.evaluation.quality.shared_prefill.cut_model", refused)
    assert not can_record(ready.llm, Policy("reconstruction", {"chunk": 60}), 60)
    assert can_record(ready.llm, Policy(), 60)


def test_what_cannot_be_recorded_is_read_by_each_plan(ready: Ready) -> None:
    assert can_record(ready.llm, Policy(), 60)
    assert not can_record(ready.llm, Policy("key_norm"), 60), "its scores are no sums of attention"
    assert can_record(ready.llm, Policy("reconstruction", {"chunk": 60}), 60)
    assert not can_record(ready.llm, Policy("reconstruction", {"chunk": 59}), 60), "survivors are chosen twice"
    plan = ready.llm.program.plan
    for changed in ({"sliding_window": 8}, {"index_dim": 8}):
        other = dataclasses.replace(plan, layers=(dataclasses.replace(plan.layers[0], **changed), plan.layers[1]))
        of_other = SimpleNamespace(program=SimpleNamespace(plan=other))
        assert not can_record(of_other, Policy(), 60), "it forgets what left its window, or keeps more than K/V"
    plans = [Candidate("uniform", "25%", Budgets.uniform(2, 40, Policy("key_norm")))]
    evaluation = ready.evaluate(plans, dataclasses.replace(SETTINGS, tasks=("needle_single",), count=1))
    assert len(evaluation.rows) == 4


# Equal bytes


def test_plans_of_a_size_take_equal_bytes(ready: Ready, found: Evaluation) -> None:
    slot = ready.llm.layers[0].slot_bytes()
    assert found.full_bytes == 2 * LENGTH * slot
    assert rows(found)["uniform", "25.0%"].kv_bytes == found.full_bytes // 4
    plans = ready.plans(0.25, scorers=("snapkv", "h2o", "streaming"))
    assert [plan.policy.scorer for plan in plans] == ["snapkv", "h2o", "streaming"]
    check_equal_bytes(plans, ready.llm.layers, LENGTH)


def test_unequal_bytes_are_refused(ready: Ready) -> None:
    plans = candidates_of_plans(ready.llm.layers, {"a": Budgets((30, 10)), "b": Budgets((30, 11))})
    with pytest.raises(BudgetError, match=r"compared at equal bytes, but those of the size 'given' take different"):
        ready.evaluate(plans)
    mixed = candidates_of_plans(
        ready.llm.layers, {"a": Budgets((30, 10)), "b": Budgets((30, 10), Policy(eviction="append"))}
    )
    with pytest.raises(BudgetError, match=r"b \(snapkv, append\)"):
        check_equal_bytes(mixed, ready.llm.layers, LENGTH)


@pytest.mark.usefixtures("_captured_once")
def test_a_profile_and_a_calibration_are_solved_by_their_own_allocators(ready: Ready) -> None:
    prompts = [random_ids(1, 60, seed=seed) for seed in range(2)]
    measured = (
        xkv_fx.profile(ready.model, prompts),
        xkv_fx.calibrate(ready.model, prompts, continuation=8),
    )
    plans = ready.plans(0.3, measured=measured)
    assert [plan.name for plan in plans] == ["xkv", "calibrated", "uniform"]
    check_equal_bytes(plans, ready.llm.layers, LENGTH)
    named = ready.plans(0.3, measured=measured, allocators=("uniform", "maxmin", "calibrated"))
    assert [plan.name for plan in named] == ["maxmin", "calibrated", "uniform"]
    with pytest.raises(BudgetError, match="'calibrated' needs"):
        ready.plans(0.3, measured=measured[:1], allocators=("calibrated",))
    with pytest.raises(BudgetError, match="needs a profile or a calibration"):
        ready.plans(0.3, allocators=("xkv",))
    of_bytes = candidates_of_bytes(ready.llm.layers, LENGTH, {"fp8 bytes": 40_000, "too large": 10**9}, measured)
    assert [plan.size for plan in of_bytes] == ["fp8 bytes"] * 3
    check_equal_bytes(of_bytes, ready.llm.layers, LENGTH)


def test_layers_with_different_numbers_of_heads_are_planned_by_head() -> None:
    wide = LayerSpec(query_heads=4, kv_heads=2, key_dim=8, value_dim=8, itemsize=4)
    layers = (dataclasses.replace(wide, kv_heads=1), wide)
    kl = np.array([[[2.0, 1.0], [0.5, 0.0], [0.1, 0.0]]], np.float32)
    measured = xkv_fx.Calibration(kl, (0.25, 0.5), (64,), 4, Policy(), one_head_specs(layers), "model", heads=(1, 2))
    plans = candidates_of_fractions(layers, 64, (0.4,), (measured,), ("calibrated",))
    assert [plan.name for plan in plans] == ["calibrated by head", "uniform"]
    assert plans[0].budgets.by_head
    check_equal_bytes(plans, layers, 64)


def test_a_profile_is_solved_in_every_format_that_is_asked_for() -> None:
    spec = LayerSpec(query_heads=4, kv_heads=2, key_dim=8, value_dim=8, itemsize=4)
    curves = np.stack([np.linspace(0, 1, 65, dtype=np.float32) ** power for power in (0.2, 0.5, 0.9, 1.0)])
    measured = xkv_fx.Profile((curves,), Policy(), one_head_specs((spec, spec)), "model", heads=(2, 2))
    plans = candidates_of_fractions((spec, spec), 64, (0.2,), (measured,), formats=(INT4,))
    assert [plan.name for plan in plans] == ["xkv by head", "xkv by head, all int4", "uniform", "all int4"]
    assert plans[1].budgets.by_head
    assert plans[1].budgets.formats == plans[3].budgets.formats == (INT4, INT4)
    check_equal_bytes(plans, (spec, spec), 64)


INT8, INT4 = ("int8", "int8"), ("int4", "int4")


@pytest.mark.usefixtures("_captured_once")
def test_formats_alone_capacities_alone_and_both_take_equal_bytes_of_bfloat16(ready: Ready) -> None:
    prompts = [random_ids(1, 60, seed=seed) for seed in range(2)]
    measured = (
        xkv_fx.calibrate(ready.model, prompts, continuation=8, formats=("model", "int8", "int4")),
        xkv_fx.calibrate(ready.model, prompts, continuation=8),
    )
    counted = with_itemsize(ready.llm.layers, 2)
    pairs = formats_of(measured)
    plans = ready.plans(0.6, 0.95, measured=measured, formats=pairs, dtype=torch.bfloat16)
    names = ["joint", "calibrated", "uniform", "all int8", "all int8/int4", "all int4"]
    assert [(plan.name, plan.size) for plan in plans] == [(name, size) for size in ("60.0%", "95.0%") for name in names]
    check_equal_bytes(plans, counted, LENGTH)
    full = full_bytes(counted, LENGTH)
    assert full == 2 * LENGTH * 2 * (8 + 8) * 2, "layers, tokens, heads, head sizes, bytes"
    taken = {(plan.name, plan.size): plan.budgets.kv_bytes(counted) / full for plan in plans}
    found = {(plan.name, plan.size): plan.budgets for plan in plans}
    assert taken["uniform", "60.0%"] == 0.6
    assert found["joint", "60.0%"].capacities == (LENGTH, LENGTH)
    assert taken["joint", "60.0%"] == (0.5 + 0.625) / 2, "a layer in int4 and one in int8/int4; no other step fits"
    assert 0.59 < taken["all int8", "60.0%"] <= 0.6
    assert found["all int8", "60.0%"].capacities == (128, 128), "12 bytes instead of 16 an 8 elements"
    assert found["all int4", "60.0%"].capacities == (LENGTH, LENGTH), "nothing is evicted, whatever is left"
    assert taken["all int4", "60.0%"] == 0.5
    assert found["joint", "60.0%"].formats is not None
    assert found["all int4", "60.0%"].mean_keys == found["joint", "60.0%"].mean_keys == measured[0].mean_keys
    assert measured[0].mean_keys is not None
    assert bits_per_element(found["all int8", "60.0%"], counted) == 12
    assert bits_per_element(found["uniform", "60.0%"], counted) == 16
    with pytest.raises(BudgetError, match="'joint' needs a calibration of formats"):
        ready.plans(0.6, measured=measured[1:], allocators=("joint",))
    both = ready.plans(0.6, measured=measured, allocators=("joint", "calibrated"))
    assert [plan.name for plan in both] == ["joint", "calibrated", "uniform"]


def test_a_plan_that_takes_less_must_hold_everything(ready: Ready) -> None:
    counted = with_itemsize(ready.llm.layers, 2)
    plans = [
        Candidate("half", "a", Budgets.uniform(2, LENGTH // 2)),
        Candidate("int4", "a", Budgets((70, 70), formats=(INT4, INT4))),
    ]
    with pytest.raises(BudgetError, match=r"half \(snapkv, ring\) 10,240, int4 \(snapkv, ring\) 4,480"):
        check_equal_bytes(plans, counted, LENGTH)
    check_equal_bytes(plans, counted, 70)


def test_bytes_are_counted_in_another_dtype_than_the_model_computes_in(ready: Ready) -> None:
    plans = ready.plans(0.5, formats=(INT8,), dtype=torch.bfloat16)
    short = dataclasses.replace(SETTINGS, tasks=("needle_single",), forms=("inside",), count=1)
    evaluation = ready.evaluate(plans, short, quantized=FP8, dtype=torch.bfloat16)
    assert evaluation.dtype == "bfloat16"
    assert evaluation.full_bytes == 2 * LENGTH * 64
    taken = {row.name: row.kv_bytes for row in evaluation.rows}
    assert taken["uniform"] == 2 * (LENGTH // 2) * 64
    assert taken["all int8"] == LENGTH * 64 // 48 * 48
    if FP8:
        assert taken["fp8"] < taken["full"] / 2 + 1000, "one byte an element, and scales"


@needs_fp8
def test_a_quantized_cache_is_counted_byte_by_byte(ready: Ready, found: Evaluation) -> None:
    row = rows(found)["fp8", "fp8"]
    tokens = LENGTH + SETTINGS.instances("needle_single", ready.tokenizer)[0].new_tokens - 1
    elements = 2 * tokens * sum(spec.kv_heads * spec.key_dim for spec in ready.llm.layers)
    scales = 2 * 2 * 4
    assert row.kv_bytes == elements + scales
    assert planned_bytes("fp8", ready.model, ready.llm.layers, LENGTH, tokens - LENGTH) == row.kv_bytes
    cache = QUANTIZED["fp8"].new_cache(ready.model.config)
    assert cache_bytes(cache) == 0


@needs_fp8
def test_what_a_quantized_cache_cannot_hold_is_said() -> None:
    cache = QUANTIZED["fp8"].new_cache(llama(2).config)
    states = torch.randn(1, 2, 6, 8)
    cache.update(states, states, 0)
    with pytest.raises(UnsupportedModelError, match=r"cannot hold keys \[1, 3, 1, 8\].*of layer 0"):
        cache.update(torch.randn(1, 3, 1, 8), torch.randn(1, 3, 1, 8), 0)


def test_a_cache_that_is_not_installed_is_named() -> None:
    missing = Quantized("hqq", 4, "no_such_module.inside", "hqq")
    assert not missing.installed
    with pytest.raises(BackendError, match="'hqq' is not installed; pip install hqq"):
        missing.new_cache(None)


# Results


def made(scores: dict[str, tuple[float, ...]], task: str = "needle_single") -> Evaluation:
    """An evaluation with a full cache, and plans named by `name/size`."""
    built = []
    for index, (plan, values) in enumerate(scores.items()):
        name, _, size = plan.partition("/")
        texts = ("",) * len(values)
        built.append(Row(name, size or name, Policy(), task, "inside", 1000 * (index + 1), {"score": values}, texts))
    return Evaluation("m", "float32", {}, (), tuple(built), 5000)


def test_differences_are_paired() -> None:
    evaluation = made({FULL: (1, 0, 1, 0), "uniform/25%": (1, 0, 1, 0), "xkv/25%": (1, 1, 1, 1)})
    full, uniform, xkv = evaluation.rows
    same = evaluation.against(uniform, evaluation.full(uniform))
    assert same is not None
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    better = evaluation.against(xkv, evaluation.uniform(xkv))
    assert better is not None
    assert better.low <= better.value == 0.5 <= better.high
    assert evaluation.against(full, evaluation.full(full)) is None


def test_a_task_that_the_full_cache_cannot_do_says_nothing() -> None:
    evaluation = made({FULL: (0.0, 0.0), "uniform/25%": (0.0, 1.0)})
    assert evaluation.says_nothing(evaluation.rows[1])
    assert "says nothing about plans" in evaluation.as_markdown()
    assert all(row["says_nothing"] for row in evaluation.to_dict()["rows"])
    assert smallest_sizes(evaluation, ("needle_single",)) == {}


def test_the_smallest_size_is_enough_from_there_on() -> None:
    evaluation = made(
        {
            FULL: (1.0, 0.5),
            "uniform/10%": (1.0, 0.5),  # by luck
            "uniform/20%": (0.5, 0.5),
            "uniform/30%": (1.0, 0.49),
            "uniform/40%": (1.0, 1.0),
            "xkv/10%": (0.0, 0.0),
        }
    )
    found = smallest_sizes(evaluation, ("needle_single",))
    assert found == {"inside": {"uniform": "30%", "xkv": None}}


def test_a_result_is_plain_json(found: Evaluation) -> None:
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["plans"][0]["name"] == FULL
    assert len(data["rows"]) == 3 * (3 + len(FP8))
    assert {row["form"] for row in data["rows"]} == {"inside", "after"}


# Interruptions


class _Stop(Exception):
    pass


def test_an_interrupted_run_goes_on_and_finds_the_same(ready: Ready, found: Evaluation, tmp_path: Path) -> None:
    plans, options = ready.plans(0.25, 1.0), {"quantized": FP8, "resume": tmp_path / "parts"}

    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise _Stop

    with pytest.raises(_Stop):
        ready.evaluate(plans, **options, progress=stop)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert len(kept) == 1 + 3 + len(FP8), "one form of the needle was finished"

    damaged = next(path for path in kept if path.name != "run.json")
    damaged.write_text("{")
    del kept[damaged]
    steps: list[int] = []
    again = ready.evaluate(plans, **options, progress=lambda done, total: steps.append(done))
    assert again.to_dict() == found.to_dict()
    assert steps == list(range(1, 3 * (3 + len(FP8)) * 2 + 1))
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items()), "what was sound is taken"

    remove_parts(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_a_folder_of_another_run_is_refused(ready: Ready, tmp_path: Path) -> None:
    short = dataclasses.replace(SETTINGS, tasks=("needle_single",), forms=("inside",), count=1)
    plans = ()
    ready.evaluate(plans, short, resume=tmp_path)
    with pytest.raises(FileFormatError, match=r"another run measured \(seed 0 instead of 1\)"):
        ready.evaluate(plans, dataclasses.replace(short, seed=1), resume=tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run, "model": ["another", *run["model"][1:]]}))
    with pytest.raises(ModelMismatchError, match="of another model"):
        ready.evaluate(plans, short, resume=tmp_path)


# Bad input


def test_a_plan_for_another_model_is_refused(ready: Ready) -> None:
    plan = Budgets.uniform(2, 40)
    foreign = dataclasses.replace(plan, provenance=Provenance(model="another"))
    with pytest.raises(ModelMismatchError, match="made for the model 'another'"):
        ready.evaluate([Candidate("theirs", "given", foreign)])
    with pytest.raises(BudgetError, match="3 capacities but the model has 2"):
        candidates_of_plans(ready.llm.layers, {"deep": Budgets.uniform(3, 40)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("needles",)}, "unknown task 'needles'"),
        ({"tasks": ()}, "at least one task"),
        ({"forms": ("before",)}, "forms must be some of inside, after; got before"),
        ({"length": 40}, "task 'needle_single': 40 tokens are too few"),
        ({"length": 390}, "more than the model's 400 positions"),
    ],
)
def test_bad_settings_are_refused(ready: Ready, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        ready.evaluate((), dataclasses.replace(SETTINGS, **changes))


@pytest.mark.parametrize("fraction", [0.0, 1.5, float("nan")])
def test_a_fraction_is_a_share(ready: Ready, fraction: float) -> None:
    with pytest.raises(BudgetError, match="fraction must be above 0 and at most 1"):
        ready.plans(fraction)


def test_two_plans_of_one_name_are_refused(ready: Ready) -> None:
    with pytest.raises(BudgetError, match="two plans named 'uniform'"):
        ready.evaluate(ready.plans(0.25) * 2)
