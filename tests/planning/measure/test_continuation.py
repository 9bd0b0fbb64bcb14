"""Continuations that are run again in one pass, against decoding them one by one with the transformed model."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from oracles.stored_llama import continue_over_slots
from ready_models import captured, model, transformed
from tiny_models import FAMILIES, random_ids
from torch import Tensor

from xkv_fx import Budgets, Policy
from xkv_fx.budgets import Capacity
from xkv_fx.errors import PromptError
from xkv_fx.mean_keys import MeanKey
from xkv_fx.passes.measure.cut_at_attention import CutModel
from xkv_fx.planning.measure.continuation import FULL, FullRun, HeadPlans, LayerPlans, cut_model, layer_plans, run_full
from xkv_fx.planning.measure.held import Storing
from xkv_fx.runtime.scorers import SnapKV

IDS = random_ids(1, 60, seed=1)
NEW = 12
EVICTIONS = ("append", "ring", "scored")
PLANS = ((20, 9), (50, 60), (48, 13))

MEAN = MeanKey(np.random.default_rng(0).normal(0, 2, (2, 8)))


@functools.cache
def cut(family: str) -> CutModel:
    return cut_model(captured(family, 2, 1))


@functools.cache
def full(family: str) -> FullRun:
    return run_full(cut(family), SnapKV(), IDS, NEW)


def plan_of(family: str, capacities: tuple[int, ...], eviction: str) -> LayerPlans:
    return layer_plans(Budgets(capacities, Policy(eviction=eviction)), captured(family, 2, 1).layers, NEW)  # type: ignore[arg-type]


def decoded(
    family: str, capacities: tuple[Capacity, ...], eviction: str, formats: Any = None, mean_keys: Any = None
) -> Tensor:
    """KL of each continuation token, from a session that decodes one after another, to transformers' own logits."""
    budgets = Budgets(capacities, Policy(eviction=eviction), formats=formats, mean_keys=mean_keys)  # type: ignore[arg-type]
    llm = transformed(budgets, family=family, max_new_tokens=NEW)
    session = llm.new_session()
    llm(IDS[:, :-NEW], past_key_values=session, logits_to_keep=1)
    logits = [
        llm(token, past_key_values=session, decoding=True).logits[0, -1] for token in IDS[:, -NEW:].split(1, dim=1)
    ]
    with torch.no_grad():
        reference = model(family)(IDS).logits[0, -NEW:].double().log_softmax(-1)
    log_q = torch.stack(logits).detach().double().log_softmax(-1)
    kl: Tensor = (reference.exp() * (reference - log_q)).sum(-1)
    return kl


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_one_pass_is_decoding_one_by_one(family: str, eviction: str) -> None:
    plans = PLANS if family == "llama" else PLANS[:1]
    kl = full(family).divergence([plan_of(family, capacities, eviction) for capacities in plans])
    for found, capacities in zip(kl, plans, strict=True):
        torch.testing.assert_close(found, decoded(family, capacities, eviction), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "eviction"), [*(("llama", name) for name in EVICTIONS), ("gemma2", "scored"), ("gpt_oss", "append")]
)
def test_one_pass_stores_as_decoding_one_by_one_does(family: str, eviction: str) -> None:
    formats, means = (("int8", "int4"), ("int4", "int8")), (MEAN, None)
    budgets = Budgets((20, 9), Policy(eviction=eviction), formats=formats, mean_keys=means)  # type: ignore[arg-type]
    (kl,) = full(family).divergence([layer_plans(budgets, captured(family, 2, 1).layers, NEW)])
    torch.testing.assert_close(kl, decoded(family, (20, 9), eviction, formats, means), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_one_pass_stores_latents_as_decoding_does(eviction: str) -> None:
    formats = (("int4", "int4"), ("fp8", "fp8"))
    budgets = Budgets((20, 9), Policy(eviction=eviction), formats=formats)  # type: ignore[arg-type]
    (kl,) = full("deepseek").divergence([layer_plans(budgets, captured("deepseek", 2, 1).layers, NEW)])
    torch.testing.assert_close(kl, decoded("deepseek", (20, 9), eviction, formats), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "eviction"), [*(("llama", name) for name in EVICTIONS), ("gemma2", "ring"), ("gpt_oss", "append")]
)
def test_one_pass_over_heads_of_their_own_plans_is_decoding_one_by_one(family: str, eviction: str) -> None:
    """Also beside plans by layer, in which these heads are alike."""
    formats = ((("int8", "int4"), None), None)
    budgets = Budgets(((20, 9), (48, 13)), Policy(eviction=eviction), formats=formats)  # type: ignore[arg-type]
    mixed = layer_plans(budgets, captured(family, 2, 1).layers, NEW)
    kl = full(family).divergence([plan_of(family, (20, 9), eviction), mixed, plan_of(family, (50, 60), eviction)])
    for found, capacities, of in zip(kl, ((20, 9), budgets.capacities, (50, 60)), (None, formats, None), strict=True):
        torch.testing.assert_close(found, decoded(family, capacities, eviction, of), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_budgets_change_nothing(family: str) -> None:
    layers = captured(family, 2, 1).layers
    assert float(full(family).divergence([(FULL,) * len(layers)] * 2).max()) < 1e-8


def test_plans_of_any_order_are_measured_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = plan_of("llama", (20, 9), "append"), plan_of("llama", (15, 30), "append")
    plans = [(FULL, first[1]), first, (FULL, FULL), (second[0], FULL), (FULL, second[1]), second]
    run = full("llama")
    together = run.divergence(plans)
    alone = torch.cat([run.divergence([plan]) for plan in plans])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)
    monkeypatch.setattr("xkv_fx.planning.measure.continuation._TOKENS_AT_ONCE", 2 * NEW)
    monkeypatch.setattr("xkv_fx.planning.measure.continuation._LOGIT_BYTES", 1)
    torch.testing.assert_close(run.divergence(plans), alone, atol=1e-6, rtol=1e-4)


def test_a_prompt_that_is_all_continuation_is_refused() -> None:
    with pytest.raises(PromptError, match="leaves none before its continuation"):
        run_full(cut("llama"), SnapKV(), IDS[:, :NEW], NEW)


@pytest.mark.parametrize("eviction", ["append", "ring"])
def test_formats_are_what_slots_give_back(eviction: str) -> None:
    """What survives the prompt, and every token of the continuation before it is attended to."""
    (first, _), (second, _) = plan_of("llama", (20, 9), eviction)
    plans: list[LayerPlans] = [
        (FULL, (None, Storing(("int4", "int4")))),
        ((first, Storing(("int8", "int4"), MEAN)), FULL),
        ((first, Storing(("int4", "model"))), (second, Storing(("int8", "int8"), MEAN))),
    ]
    with torch.no_grad():
        reference = model("llama")(IDS).logits[0, -NEW:].double().log_softmax(-1)
    for found, plan in zip(full("llama").divergence(plans), plans, strict=True):
        log_q = continue_over_slots(model("llama"), IDS, NEW, plan).double().log_softmax(-1)
        torch.testing.assert_close(found, (reference.exp() * (reference - log_q)).sum(-1), atol=2e-6, rtol=1e-3)


def test_what_cut_layers_hold_is_not_remembered() -> None:
    run = full("llama")
    (first, _), _ = plan_of("llama", (20, 9), "append")
    run.divergence([((first, Storing(("int8", "int8"))), FULL), (FULL, FULL), (HeadPlans((FULL, (first, None))), FULL)])
    assert set(run._held) <= {(0, FULL, None), (1, FULL, None)}
    assert not run._stored
