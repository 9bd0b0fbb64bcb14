"""Multi-head latent attention: the latents are cached, as transformers does, and eviction is that of whole tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import default_recent, snapkv_scores, survivors
from exhaustive import exhaustive
from latent_models import deepseek
from tiny_models import random_ids
from torch import Tensor
from transformers import DynamicCache

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.compile_backend.dynamo_graph import _has_effects
from xkv_fx.errors import BudgetError
from xkv_fx.hf.capture import capture_source, layers_of_model
from xkv_fx.hf.generation import BudgetedLM
from xkv_fx.hf.inspect import read_model
from xkv_fx.layers import LayerSpec
from xkv_fx.passes.pipeline import profile_pipeline, run_pipeline
from xkv_fx.runtime.scorers.expected_attention import ExpectedAttention
from xkv_fx.runtime.scorers.prompt import PromptView

LENGTH, STEPS = 40, 12
CAPACITIES = (20, 20)  # equal, since transformers makes one mask for all layers
LATENT = LayerSpec(query_heads=4, kv_heads=1, key_dim=16 + 8, value_dim=0, itemsize=4)
TOKENS = random_ids(1, LENGTH + STEPS, seed=3)


@pytest.fixture(scope="module")
def model() -> Any:
    return deepseek()


@pytest.fixture(scope="module")
def llm(model: Any) -> BudgetedLM:
    return xkv_fx.transform(model, Budgets(CAPACITIES), backend="eager")


def gathered(latents: list[tuple[Tensor, Tensor]], kept: list[list[int]]) -> DynamicCache:
    """transformers' own cache of some tokens' latents and rotary keys, `[1, 1, tokens, ...]` for each layer."""
    cache = DynamicCache()
    for layer, (both, tokens) in enumerate(zip(latents, kept, strict=True)):
        cache.update(*(states[:, :, tokens] for states in both), layer)
    return cache


def test_what_is_cached(model: Any, llm: BudgetedLM) -> None:
    assert llm.layers == layers_of_model(model) == (LATENT,) * 2
    assert llm.kv_bytes == llm.new_session().kv_bytes == sum(CAPACITIES) * (16 + 8) * 4
    assert "latent of 24" in llm.describe()


def test_eviction_by_hand(model: Any, llm: BudgetedLM) -> None:
    """What prefill keeps, and the logits of decode: those of transformers over the latents of the tokens kept."""
    cache = DynamicCache()
    with torch.no_grad():
        found = model(TOKENS[:, :LENGTH], past_key_values=cache, output_attentions=True)
    kept = [
        survivors(snapkv_scores(weights[0], kv_heads=1), capacity, default_recent(capacity))[0]
        for weights, capacity in zip(found.attentions, CAPACITIES, strict=True)
    ]
    session = llm.new_session()
    logits = llm(TOKENS[:, :LENGTH], past_key_values=session, logits_to_keep=1).logits
    torch.testing.assert_close(logits[:, -1], found.logits[:, -1], atol=1e-4, rtol=0)
    for layer, tokens in enumerate(kept):
        assert sorted(session.kept_positions(layer)[0, 0].tolist()) == tokens

    latents = [(layer.keys, layer.values) for layer in cache.layers]
    for token in range(LENGTH, LENGTH + STEPS):
        for tokens, capacity in zip(kept, CAPACITIES, strict=True):
            tokens.remove(token - default_recent(capacity))  # the oldest of the ring
        held = gathered(latents, kept)
        with torch.no_grad():
            expected = model(TOKENS[:, token : token + 1], past_key_values=held, position_ids=torch.tensor([[token]]))
        step = llm(TOKENS[:, token : token + 1], past_key_values=session, decoding=True).logits
        torch.testing.assert_close(step, expected.logits, atol=1e-4, rtol=0)
        for layer, tokens in enumerate(kept):
            new = (held.layers[layer].keys[:, :, -1:], held.layers[layer].values[:, :, -1:])
            latents[layer] = tuple(torch.cat(both, 2) for both in zip(latents[layer], new, strict=True))  # type: ignore[assignment]
            tokens.append(token)


@pytest.mark.parametrize("eviction", ["ring", "scored", "append"])
def test_full_budgets_are_exact_in_every_form(model: Any, llm: BudgetedLM, eviction: Any) -> None:
    """A prompt in chunks, so that slots are attended to and kept again, and decode."""
    budgets = dataclasses.replace(Budgets.uniform(2, LENGTH + STEPS), policy=Policy(eviction=eviction))
    full = llm.with_budgets(budgets, max_new_tokens=STEPS if eviction == "append" else 0)
    prompt = TOKENS[:, :LENGTH]
    options: Any = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
    got = full.generate(prompt, prefill_chunk_size=16, **options)
    expected = model.generate(prompt, **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(got.logits), torch.cat(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("policy", [Policy(scorer="value_norm"), Policy(scorer="h2o", eviction="scored")])
def test_scorers_see_the_latents(llm: BudgetedLM, policy: Policy) -> None:
    tight = llm.with_budgets(Budgets(CAPACITIES, policy=policy))
    ids = tight.generate(TOKENS[:, :LENGTH], max_new_tokens=STEPS, prefill_chunk_size=24)
    assert ids.shape == (1, LENGTH + STEPS)


def test_latents_in_fewer_bits_on_every_road(model: Any, llm: BudgetedLM, tmp_path: Path) -> None:
    """Calibrated, solved, saved in a plan, served, counted and described."""
    prompts, append = [TOKENS[0, :LENGTH]], Policy(eviction="append")
    measured = xkv_fx.calibrate(model, prompts, policy=append, formats=("int8", "int4", "fp8"), continuation=4)
    assert measured.pairs == (("int8", "int8"), ("fp8", "fp8"), ("int4", "int4"))
    xkv_fx.solve(measured, kv_bytes=2000, max_new_tokens=STEPS).save(tmp_path / "plan.json")
    assert 1900 < Budgets.load(tmp_path / "plan.json").kv_bytes(model, max_new_tokens=STEPS) <= 2000
    plan = Budgets(CAPACITIES, append, formats=(("fp8", "fp8"), ("int4", "int4")))
    stored = llm.with_budgets(plan, max_new_tokens=STEPS)
    session = stored.new_session()
    stored.generate(TOKENS[:, :LENGTH], max_new_tokens=STEPS, past_key_values=session)
    first, second = plan.slots(llm.layers, STEPS)
    assert session.kv_bytes == stored.kv_bytes == first * (24 + 2) + second * (12 + 4)
    assert plan.kv_bytes(model, max_new_tokens=STEPS) == stored.kv_bytes
    assert "latent of 24 fp8" in stored.describe()
    with pytest.raises(BudgetError, match="layer 0 as int8 and its values as int4, but keys and values are one latent"):
        llm.with_budgets(Budgets(CAPACITIES, formats=(("int8", "int4"), None)))


@exhaustive
def test_an_engine_of_latents_in_fewer_bits_generates_the_same(llm: BudgetedLM, tmp_path: Path) -> None:
    stored = llm.with_budgets(Budgets(CAPACITIES, formats=(("fp8", "fp8"), ("int4", "int4"))))
    xkv_fx.export(stored, tmp_path / "engine", target="pt2")
    engine = xkv_fx.load(tmp_path / "engine", trust=True)
    prompt = TOKENS[:, :LENGTH]
    assert torch.equal(engine.generate(prompt, STEPS), stored.generate(prompt, max_new_tokens=STEPS))


class Paid(ExpectedAttention):
    """Without the values, whose norms are of other things."""

    def __call__(self, prompt: PromptView) -> Tensor:
        return super().__call__(dataclasses.replace(prompt, v=prompt.k.new_ones((*prompt.k.shape[:3], 1))))


def test_attention_expected_of_latents_is_that_of_the_heads() -> None:
    """The queries that are to come are told before they become queries of the latent; the mean over all heads."""
    (source, facts), scores = read_model(deepseek(1)), []
    for latents in (True, False):
        known = dataclasses.replace(facts, has_latents=latents)
        captured = capture_source(source, known, check=False, decode=False)
        module = captured.graph("prompt")
        run_pipeline(module, profile_pipeline(Paid(future_positions=20, sinks=0), layers=captured.layers))
        positions = torch.arange(LENGTH)[None]
        with torch.no_grad():
            scores.append(module(TOKENS[:, :LENGTH], positions, torch.ones(1, LENGTH, dtype=torch.bool))[0])
    assert scores[0].shape[1] == 1
    torch.testing.assert_close(scores[0], scores[1].mean(1, keepdim=True))


def test_dynamos_graph_keeps_methods_that_change_a_tensor() -> None:
    """As those that fill the keys; nothing reads what they return."""

    def fill(x: Tensor) -> Tensor:
        filled = x.new_empty(4)
        filled[:2].copy_(x)
        filled[2:].copy_(x.sum())
        x.add(1)
        return filled

    graph = torch.fx.symbolic_trace(fill).graph
    graph.eliminate_dead_code(_has_effects)
    targets = [node.target for node in graph.nodes]
    assert targets.count("copy_") == 2
    assert "add" not in targets


@exhaustive
def test_a_model_that_torch_compile_makes(llm: BudgetedLM) -> None:
    compiled, budgets = deepseek(), Budgets(CAPACITIES)
    compiled.set_attn_implementation("xkv")
    compiled.compile(backend="xkv", options={"budgets": budgets, "lower": "eager"})
    prompt = TOKENS[:, :LENGTH]
    got = compiled.generate(prompt, max_new_tokens=4, past_key_values=xkv_fx.Cache(compiled, budgets))
    assert torch.equal(got, llm.generate(prompt, max_new_tokens=4))
    torch._dynamo.reset()
