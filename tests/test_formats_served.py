"""Plans with formats on every public road: the same tokens by generate, by torch.compile and by an engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exhaustive import exhaustive
from tiny_models import llama, random_ids

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.errors import BackendError, BudgetError, FileFormatError, SessionError

MIXED = Budgets((12, 17), Policy(), formats=(("int8", "int4"), None))
MEAN = np.random.default_rng(0).normal(0, 2, (2, 8))
WITH_MEANS = dataclasses.replace(MIXED, mean_keys=(MEAN, MEAN))
OPTIONS: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}


def test_generate_counts_what_it_stores() -> None:
    model = llama(2)
    llm = xkv_fx.transform(model, MIXED, batch_size=2, backend="eager")
    planned = MIXED.kv_bytes(model, batch_size=2)
    assert planned == 2 * 2 * (12 * (8 + 4 + 4 + 4) + 17 * (8 + 8) * 4)
    session = llm.new_session()
    text = llm.generate(random_ids(2, 30), past_key_values=session, **OPTIONS)
    assert text.shape == (2, 39)
    assert llm.kv_bytes == session.kv_bytes == planned
    assert "int8/int4" in llm.describe()
    again = llm.generate(torch.cat((text, random_ids(2, 4)), 1), past_key_values=session, **OPTIONS)
    assert again.shape == (2, 52)
    assert session.kv_bytes == planned


def test_int8_of_every_token_is_nearly_the_full_cache() -> None:
    model, ids = llama(2), random_ids(1, 30)
    stored = Budgets((64, 64), Policy(eviction="none"), formats=(("int8", "int8"),) * 2)
    llm = xkv_fx.transform(model, stored, backend="eager")
    session = llm.new_session()
    llm(ids, past_key_values=session)
    with torch.no_grad():
        expected = model(torch.cat((ids, ids[:, :4]), 1)).logits[:, 30:]
    got = torch.cat([session.step(ids[:, at : at + 1], None) for at in range(4)], 1)
    assert float((got - expected).abs().max() / expected.abs().max()) < 0.02


@pytest.mark.parametrize(
    "formats",
    [MIXED.formats, pytest.param((("fp8", "int4"), ("fp8", "fp8")), marks=exhaustive)],
    ids=["whole numbers", "fp8"],
)
def test_an_engine_and_a_compiled_model_generate_the_same(tmp_path: Path, formats: Any) -> None:
    model, ids = llama(2), random_ids(1, 30)
    mixed = dataclasses.replace(MIXED, formats=formats, mean_keys=(MEAN, MEAN))
    llm = xkv_fx.transform(model, mixed, backend="eager")
    expected = llm.generate(ids, **OPTIONS)
    xkv_fx.export(llm, tmp_path / "engine", target="pt2")
    engine = xkv_fx.load(tmp_path / "engine", trust=True)
    assert engine.budgets == mixed
    assert torch.equal(engine.generate(ids, 9), expected)
    session = engine.new_session()
    assert session.state.kv_bytes == engine.kv_bytes == mixed.kv_bytes(model)
    torch._dynamo.reset()
    compiled = llama(2)
    compiled.set_attn_implementation("xkv")
    compiled.compile(backend="xkv", options={"budgets": mixed, "lower": "eager"})
    cache = xkv_fx.Cache(compiled, mixed)
    assert torch.equal(compiled.generate(ids, past_key_values=cache, **OPTIONS), expected)
    assert cache.kv_bytes == mixed.kv_bytes(model)
    coded = sum(pair is not None for pair in formats)
    for described in (llm.describe(), cache.describe()):
        assert f"mean keys     of {coded} layers, constants of the graphs ({64 * coded} bytes" in described
    (tmp_path / "engine" / "constants.safetensors").write_bytes(b"other")
    with pytest.raises(FileFormatError, match=r"constants\.safetensors: .*not the plan's constants"):
        xkv_fx.load(tmp_path / "engine", trust=True)


def test_plans_of_other_formats_do_not_share_sessions(tmp_path: Path) -> None:
    model = llama(2)
    llm = xkv_fx.transform(model, MIXED, backend="eager")
    plain = llm.with_budgets(Budgets((12, 17)))
    session = plain.new_session()
    plain(random_ids(1, 20), past_key_values=session)
    session.save(tmp_path / "session")
    with pytest.raises(SessionError, match="of another model, other budgets"):
        llm.new_session().load(tmp_path / "session")


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ((("fp8", "int5"), None), "unknown format 'int5' of the values of layer 0"),
        ((None, ("int8", "int8"), None), "formats has 3 entries for 2 capacities"),
    ],
)
def test_what_is_not_served_is_refused_at_once(formats: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        xkv_fx.transform(llama(2), Budgets((12, 17), formats=formats), backend="eager")


def test_tensorrt_is_refused_by_name() -> None:
    from xkv_fx.engines.tensorrt.graph import trace_for_tensorrt

    llm = xkv_fx.transform(llama(2), MIXED, backend="eager")
    with pytest.raises(BackendError, match="'tensorrt' stores keys and values in the model's dtype"):
        trace_for_tensorrt(llm.decode, llm.program.plan)
