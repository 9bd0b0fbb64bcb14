"""Bad input, by the public calls alone: one clear error that names what was wrong, and nothing left behind."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ready_models import FULL, full, model, remember_captures
from tiny_models import POSITIONS, Snapshot, build, llama, random_ids
from transformers import MambaConfig, MambaForCausalLM

import xkv_fx
from xkv_fx import (
    BackendError,
    BudgetError,
    Budgets,
    FileFormatError,
    ModelMismatchError,
    Policy,
    Profile,
    PromptError,
    UnsupportedModelError,
    XkvError,
)

PLAN = Budgets((12, 17))


def assert_refused(error: type[XkvError], message: str, attempt: Callable[[], Any]) -> str:
    """One error of ours, in one line; returns what it says."""
    with pytest.raises(error, match=message) as caught:
        attempt()
    assert type(caught.value) is error
    text = str(caught.value)
    assert text == text.strip()
    assert len(text.splitlines()) == 1
    return text


@functools.cache
def profile() -> Profile:
    return xkv_fx.profile(model(), [random_ids(1, 40)])


def transform(budgets: Any = PLAN, source: Any = None, **options: Any) -> Any:
    return xkv_fx.transform(source or model(), budgets, **{"backend": "eager", "check": False, **options})


@pytest.fixture(autouse=True)
def _shared_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    remember_captures(monkeypatch)
    snapshot = Snapshot.of(model())
    yield
    snapshot.assert_unchanged()


# Capacities


@pytest.mark.parametrize("count", [1, 3, 30])
def test_a_wrong_number_of_capacities(count: int) -> None:
    message = f"the plan has {count} capacities but the model has 2 layers that own a KV cache"
    assert_refused(BudgetError, message, lambda: transform(Budgets((12,) * count)))
    assert_refused(BudgetError, message, lambda: Budgets((12,) * count).kv_bytes(model()))


@pytest.mark.parametrize("capacity", [0, -1, -(10**20)])
def test_a_capacity_below_one(capacity: int) -> None:
    assert_refused(
        BudgetError, f"capacity of layer 1 must be at least 1; got {capacity}", lambda: Budgets((12, capacity))
    )


@pytest.mark.parametrize("capacity", [1.0, 12.5, "12", None, True, float("nan"), {12}, [12.5], [[12]]], ids=repr)
def test_a_capacity_that_is_no_whole_number(capacity: Any) -> None:
    message = r"capacity of layer 1(, KV head 0)? must be a whole number; got"
    assert_refused(BudgetError, message, lambda: Budgets((12, capacity)))


@pytest.mark.parametrize("capacities", [(), [], 12, None, "12", {12, 17}], ids=repr)
def test_capacities_that_are_no_list_of_them(capacities: Any) -> None:
    assert_refused(BudgetError, "capacities", lambda: Budgets(capacities))


@pytest.mark.parametrize("budgets", [(12, 17), [12, 17], None, "budgets.json", {"capacities": (12, 17)}], ids=repr)
def test_budgets_of_another_type(budgets: Any) -> None:
    assert_refused(BudgetError, "budgets must be an xkv_fx.Budgets; got", lambda: transform(budgets))


def test_more_bytes_than_there_are() -> None:
    llm = transform(Budgets((10**15, 17)))
    text = assert_refused(BudgetError, "bytes of KV cache for 1 rows, more than cpu could give", llm.new_session)
    assert f"{llm.kv_bytes:,}" in text


# Constraints


@pytest.mark.parametrize("total", [1, 0, -5])
def test_a_total_below_one_slot_a_layer(total: int) -> None:
    assert_refused(BudgetError, r"\b2\b", lambda: xkv_fx.solve(profile(), total_tokens=total))


@pytest.mark.parametrize("total", [81, 10**9])
def test_a_total_above_layers_times_context(total: int) -> None:
    text = assert_refused(BudgetError, f"{total}", lambda: xkv_fx.solve(profile(), total_tokens=total))
    assert "80" in text or ("2" in text and "40" in text)
    assert xkv_fx.solve(profile(), total_tokens=80).capacities == (40, 40)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), float("inf"), "half", True])
def test_a_fraction_that_is_none(fraction: Any) -> None:
    assert_refused(BudgetError, "fraction", lambda: xkv_fx.solve(profile(), fraction=fraction))


@pytest.mark.parametrize("constraints", [{}, {"fraction": 0.5, "total_tokens": 40}], ids=["none", "two"])
def test_not_exactly_one_constraint(constraints: dict[str, Any]) -> None:
    assert_refused(BudgetError, "give exactly one of", lambda: xkv_fx.solve(profile(), **constraints))


@pytest.mark.parametrize("context", [0, -1, 1.5, "40"])
def test_a_context_that_is_none(context: Any) -> None:
    assert_refused(BudgetError, "context", lambda: xkv_fx.solve(profile(), fraction=0.5, context=context))


# Prompts


def test_an_empty_prompt() -> None:
    assert_refused(PromptError, "the prompt is empty", lambda: full().generate(random_ids(1, 0), max_new_tokens=3))
    assert_refused(PromptError, "prompt 0 is empty", lambda: xkv_fx.profile(model(), [[]]))


def test_a_prompt_longer_than_the_models_positions() -> None:
    length = POSITIONS + 1
    message = f"{length} tokens,? .*more than the model's {POSITIONS} positions"
    ids = random_ids(1, length)
    llm = transform()
    assert_refused(PromptError, message.replace(",? .*", " are "), lambda: llm.generate(ids, max_new_tokens=3))
    assert_refused(PromptError, message, lambda: xkv_fx.profile(model(), [ids]))
    assert llm.generate(random_ids(1, 9), max_new_tokens=3, do_sample=False).shape == (1, 12), "it goes on working"


# Models and backends


def mamba() -> Any:
    return build(MambaForCausalLM, MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2))


@pytest.mark.parametrize(
    "call",
    [
        lambda source: xkv_fx.transform(source, PLAN),
        lambda source: xkv_fx.profile(source, [[3, 4, 5]]),
        lambda source: PLAN.kv_bytes(source),
    ],
    ids=["transform", "profile", "kv_bytes"],
)
def test_a_model_without_attention_that_can_be_captured(call: Callable[[Any], Any]) -> None:
    source = mamba()
    snapshot = Snapshot.of(source)
    assert_refused(UnsupportedModelError, "MambaForCausalLM has no attention", lambda: call(source))
    snapshot.assert_unchanged()


@pytest.mark.parametrize("backend", ["tvm", "", None, "Inductor"])
def test_an_unknown_backend(backend: Any) -> None:
    assert_refused(
        BackendError, "unknown backend .*; choose one of inductor, eager", lambda: transform(backend=backend)
    )


@pytest.mark.parametrize("room", [-1, 1.5, "3", None])
def test_room_for_new_tokens_that_is_no_count(room: Any) -> None:
    budgets = Budgets((12, 17), Policy(eviction="append"))
    assert_refused(
        BudgetError, "max_new_tokens must be a whole number", lambda: transform(budgets, max_new_tokens=room)
    )


@pytest.mark.parametrize("rows", [0, -1, 1.5, "2", None, True])
def test_a_batch_size_that_is_none(rows: Any) -> None:
    assert_refused(BudgetError, "batch_size must be a whole number of at least 1", lambda: transform(batch_size=rows))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy(scorer="guess"), "unknown scorer 'guess'; registered are"),
        (Policy(scorer_options={"kernel": 4}), "kernel must be an odd whole number"),
        (Policy(scorer_options={"observation_window": 0}), "observation_window must be"),
        (Policy(scorer_options={"kernl": 7}), "has no option 'kernl'"),
        (Policy("random", eviction="scored"), "scores of 'random' are not attention mass, and eviction='scored' would"),
        (Policy("value_norm", eviction="scored"), "scores of 'value_norm' are not attention mass"),
    ],
)
def test_a_policy_that_cannot_be_served(policy: Policy, message: str) -> None:
    assert_refused(BudgetError, message, lambda: transform(Budgets((12, 17), policy)))


# Files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "budgets.json"
    xkv_fx.solve(profile(), fraction=0.5).save(path)
    return path


def test_a_saved_plan_serves_the_model_it_was_made_for(saved: Path) -> None:
    llm = transform(Budgets.load(saved))
    assert llm.budgets.total_tokens == 40
    assert llm.generate(random_ids(1, 50), max_new_tokens=5, do_sample=False).shape == (1, 55)


def test_a_plan_of_another_model(saved: Path) -> None:
    other = llama(2, rope_parameters={"rope_type": "default", "rope_theta": 999.0})
    text = assert_refused(
        ModelMismatchError, "the plan was made for the model", lambda: transform(Budgets.load(saved), other)
    )
    assert text.count("LlamaForCausalLM:") == 2


def test_a_plan_of_a_newer_format(saved: Path) -> None:
    data = json.loads(saved.read_text())
    saved.write_text(json.dumps({**data, "version": xkv_fx.budgets.FORMAT_VERSION + 1}))
    assert_refused(FileFormatError, r"budgets\.json: .*newer than .*upgrade xkv_fx", lambda: Budgets.load(saved))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.995])
def test_a_plan_that_was_cut_off(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    assert_refused(FileFormatError, r"budgets\.json: not valid JSON", lambda: Budgets.load(saved))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "xkv_fx.profile"}, "not a xkv_fx.budgets file"),
        ({"capacities": [12, 0]}, "the capacity of layer 1 must be at least 1; got 0"),
        ({"capacities": [12, 1.5]}, "the capacity of layer 1 must be a whole number; got 1.5"),
        ({"capacities": None}, "'capacities' is missing or not a list"),
        ({"policy": {"eviction": "lru"}}, "unknown eviction 'lru'"),
        ({"policy": {"novelty": 1}}, "unknown policy fields 'novelty'"),
        ({"surprise": 1}, "unknown fields 'surprise'"),
    ],
)
def test_a_damaged_plan(saved: Path, changes: dict[str, Any], message: str) -> None:
    saved.write_text(json.dumps({**json.loads(saved.read_text()), **changes}))
    assert_refused(FileFormatError, rf"budgets\.json: {message}", lambda: Budgets.load(saved))


def test_a_plan_that_cannot_be_written_leaves_the_older_one(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(FileNotFoundError):
        PLAN.save(saved.parent / "missing" / "budgets.json")
    broken = Budgets((1,), provenance=xkv_fx.budgets.Provenance(held_out={"kl": object()}))
    with pytest.raises(TypeError):
        broken.save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["budgets.json"]


# Order


def test_what_is_wrong_with_the_plan_is_said_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(*args: Any, **kwargs: Any) -> None:
        pytest.fail("it was compiled all the same")

    monkeypatch.setattr(torch._inductor, "standalone_compile", compile_nothing)
    assert_refused(BudgetError, "capacities", lambda: transform(Budgets((12,) * 3), backend="inductor"))
    foreign = Budgets((12, 17), provenance=xkv_fx.budgets.Provenance(model="OtherForCausalLM:0"))
    assert_refused(ModelMismatchError, "OtherForCausalLM:0", lambda: transform(foreign, backend="inductor"))


def test_after_a_refused_transform_the_model_is_as_usable_as_before() -> None:
    assert_refused(BudgetError, "capacities", lambda: transform(Budgets((12,))))
    assert transform(Budgets.full(2, FULL)).generate(random_ids(1, 9), max_new_tokens=3).shape == (1, 12)
