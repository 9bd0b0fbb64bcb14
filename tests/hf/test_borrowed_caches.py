"""Layers that attend to the K/V of an earlier layer (Gemma 3n, Gemma 4): one cache for all of them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny_models import random_ids
from torch import Tensor
from transformers import PreTrainedModel

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.errors import BudgetError
from xkv_fx.evaluation.coverage.tiny import Registered, tiny_model
from xkv_fx.hf.generation import BudgetedLM

# Four layers: the last two read what the first two keep, of which one has a sliding window of 8.
BORROWERS = Registered("gemma4_text", "Gemma4ForCausalLM")
LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
PROMPTS = [random_ids(1, 40, seed=seed)[0] for seed in range(2)]
NEW = 6


@pytest.fixture(autouse=True)
def _captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = full().program.graphs.captured
    monkeypatch.setattr("xkv_fx.hf.capture.capture", lambda source, **_: captured)


@functools.cache
def model() -> PreTrainedModel:
    return tiny_model(BORROWERS, **LAYERS)


@functools.cache
def full() -> BudgetedLM:
    return xkv_fx.transform(model(), Budgets.full(2, 80), backend="eager")


def generated(source: Any, **options: Any) -> Tensor:
    ids = random_ids(1, 40)
    return source.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0, **options)


def test_four_layers_have_two_caches() -> None:
    budgets = Budgets((6, 20))
    llm = full().with_budgets(budgets)
    assert [spec.sliding_window for spec in llm.layers] == [8, None]
    assert llm.kv_bytes == sum(c * spec.slot_bytes(torch.float32) for c, spec in zip((6, 20), llm.layers, strict=True))
    assert llm.kv_bytes == budgets.kv_bytes(model())
    assert llm.new_session().kv_bytes == llm.kv_bytes
    assert "2 attentions read an earlier one's cache" in llm.describe()


@pytest.mark.parametrize("chunk", [None, 7])
def test_full_budgets_are_exact(chunk: int | None) -> None:
    torch.testing.assert_close(generated(full(), prefill_chunk_size=chunk), generated(model()))


@pytest.mark.parametrize("eviction", ["ring", "append"])
def test_decoding_is_what_verifying_measures(eviction: Any) -> None:
    """Two ways to the same numbers: the graphs that serve, and the cut graph run again from the full cache."""
    budgets = Budgets((6, 20), Policy(eviction=eviction))
    llm = full().with_budgets(budgets, max_new_tokens=NEW if eviction == "append" else 0)
    report = xkv_fx.verify(model(), budgets, PROMPTS, continuation=NEW)
    for ids, kl in zip(PROMPTS, report.kl, strict=True):
        with torch.no_grad():
            exact = torch.log_softmax(model()(ids[None]).logits[0, -NEW:].double(), -1)
        session = llm.new_session()
        llm(ids[None, :-NEW], past_key_values=session, logits_to_keep=1)
        steps = [llm(token.view(1, 1), past_key_values=session, decoding=True).logits[0] for token in ids[-NEW:]]
        ours = torch.log_softmax(torch.cat(steps).double(), -1)
        assert float((exact.exp() * (exact - ours)).sum(1).mean()) == pytest.approx(kl, rel=1e-2)


def test_planning_counts_caches() -> None:
    profile = xkv_fx.profile(model(), PROMPTS, statistics=("preference", "similarity"))
    calibration = xkv_fx.calibrate(model(), PROMPTS, grid=(0.25, 0.5), continuation=NEW)
    for measured in (profile, calibration):
        assert len(measured.layers) == 2
        assert len(xkv_fx.solve(measured, fraction=0.5, multiple=1).capacities) == 2
    assert (calibration.kl[:, :, 0] > 0).all()


def test_eviction_by_score_is_refused() -> None:
    scored = Policy(scorer="h2o", eviction="scored")
    with pytest.raises(BudgetError, match="keys and values of an earlier layer"):
        full().with_budgets(Budgets((6, 20), scored))
    with pytest.raises(BudgetError, match="keys and values of an earlier layer"):
        xkv_fx.calibrate(model(), PROMPTS, grid=(0.25, 0.5), policy=scored, continuation=NEW)
