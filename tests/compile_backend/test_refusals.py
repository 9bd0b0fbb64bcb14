"""What the backend "xkv" refuses: our own errors, raised by the call, with a message that says what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from exhaustive import exhaustive
from tiny_models import llama, random_ids
from torch.fx import Graph, GraphModule
from transformers import DynamicCache, PreTrainedModel

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.budgets import Provenance
from xkv_fx.compile_backend.backend import xkv
from xkv_fx.errors import BackendError, BudgetError, ModelMismatchError, SessionError, XkvError
from xkv_fx.hf.cache import SessionCache

BUDGETS = Budgets((6,))
OPTIONS: dict[str, Any] = {"budgets": BUDGETS, "lower": "eager"}


@pytest.fixture(autouse=True)
def _compiles_of_this_test_alone() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # which a reset leaves as they are
    yield
    torch._dynamo.reset()


def compiled(options: dict[str, Any] = OPTIONS, attention: str = "xkv", **settings: Any) -> PreTrainedModel:
    model = llama(1)
    model.set_attn_implementation(attention)
    model.compile(backend="xkv", options=dict(options), **settings)
    return model


def prompt(length: int = 9) -> dict[str, Any]:
    return {"input_ids": random_ids(1, length), "position_ids": torch.arange(length)[None], "use_cache": False}


@pytest.mark.parametrize(
    ("options", "mode", "error", "message"),
    [
        (None, None, BackendError, r"pass options=\{'budgets': budgets\}"),
        ({}, None, BackendError, r"pass options=\{'budgets': budgets\}"),
        (None, "max-autotune", BackendError, "no modes; leave mode='max-autotune' out"),
        (
            {**OPTIONS, "speed": 1},
            None,
            BackendError,
            "unknown options speed; .* knows budgets, lower, max_new",
        ),
        ({**OPTIONS, "lower": "gcc"}, None, BackendError, "unknown backend 'gcc'"),
        ({"budgets": "nowhere/plan.json"}, None, BackendError, "nowhere/plan.json"),
        ({"budgets": (6,)}, None, BudgetError, "must be an xkv_fx.Budgets or the path of one; got tuple"),
        ({"budgets": Budgets((6,), Policy("nothing"))}, None, BudgetError, "nothing"),
    ],
)
def test_options(options: Any, mode: str | None, error: type[XkvError], message: str) -> None:
    run = xkv(GraphModule({}, Graph()), [], options=options, mode=mode)
    for _ in range(2):
        with pytest.raises(error, match=message):
            run()


@pytest.mark.parametrize(
    ("budgets", "error", "message"),
    [
        (Budgets((6, 6)), BudgetError, "2 capacities but the model has 1 layers"),
        (
            dataclasses.replace(BUDGETS, provenance=Provenance(model="Other:1")),
            ModelMismatchError,
            "made for the model 'Other:1'",
        ),
        ("nowhere/plan.json", FileNotFoundError, "nowhere/plan.json"),
    ],
)
def test_plans_of_other_models(budgets: Any, error: type[Exception], message: str) -> None:
    """By the cache, before anything is compiled; the backend makes such a cache itself where it is given none."""
    with pytest.raises(error, match=message):
        xkv_fx.Cache(llama(1), budgets)


@exhaustive
def test_a_plan_of_another_model_without_a_cache() -> None:
    with pytest.raises(BudgetError, match="2 capacities but the model has 1 layers"):
        compiled({**OPTIONS, "budgets": Budgets((6, 6))})(**prompt())


@exhaustive
def test_a_model_with_another_attention() -> None:
    with pytest.raises(BackendError, match=r"set_attn_implementation\('xkv'\)"):
        compiled(attention="sdpa")(**prompt())


@exhaustive
def test_a_graph_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkv_fx.compile_backend.backend.leave_lengths_open", lambda *inputs: None)
    with pytest.raises(BackendError, match=r"for 9 tokens alone.*without dynamic=False"):
        compiled(dynamic=False)(**prompt())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"use_cache": True}, SessionError, r"past_key_values=xkv_fx.Cache\(model, budgets\), or use_cache=False"),
        pytest.param({"position_ids": None}, BackendError, "by its name, position_ids", marks=exhaustive),
        pytest.param({"labels": random_ids(1, 9)}, BackendError, "leave out labels", marks=exhaustive),
        pytest.param({"output_hidden_states": True}, BackendError, "output_hidden_states", marks=exhaustive),
        pytest.param({"logits_to_keep": 2}, BackendError, r"logits_to_keep must be 0 \(all\) or 1", marks=exhaustive),
        pytest.param(
            {"attention_mask": torch.ones(1, 1, 9, 9)}, XkvError, "mask of its own", marks=exhaustive
        ),
    ],
)  # fmt: skip
def test_calls(arguments: dict[str, Any], error: type[XkvError], message: str) -> None:
    model = compiled()
    for _ in range(2):
        with pytest.raises(error, match=message):
            model(**{**prompt(), **arguments})


def test_caches() -> None:
    """One of transformers, the one that generate makes by itself, a transformed model's."""
    model, ids = compiled(), random_ids(1, 9)
    session = SessionCache(xkv_fx.Cache(model, BUDGETS).session.program)
    for cache, name in ((DynamicCache(), "DynamicCache"), (None, "DynamicCache"), (session, "SessionCache")):
        with pytest.raises(SessionError, match=rf"a {name} has no bounded memory.*xkv_fx.Cache\(model, budgets\)"):
            model.generate(ids, max_new_tokens=3, past_key_values=cache)
    assert not torch._dynamo.utils.counters["graph_break"], "after one, Dynamo would compile no model any more"


def test_what_dynamo_gives_up_on_is_not_run_wrongly(tmp_path: Any) -> None:
    """The plan may be given by its path, too."""
    BUDGETS.save(tmp_path / "plan.json")
    model = compiled({**OPTIONS, "budgets": tmp_path / "plan.json"})
    with torch._dynamo.config.patch(recompile_limit=1):
        model(**prompt())
        with pytest.raises(SessionError, match="Dynamo has given up on it"):
            model(**{**prompt(1), "position_ids": torch.tensor([[9]])})
    assert xkv_fx.compiled_session(model).budgets == BUDGETS


def test_a_session_that_is_not_there() -> None:
    with pytest.raises(SessionError, match="was not called yet"):
        xkv_fx.compiled_session(llama(1))
