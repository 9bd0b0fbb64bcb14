"""What every scorer keeps of a real prompt in SmolLM2, against its formula written down over transformers' own tensors.

Run by `make test-exhaustive`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import by_hand
import pytest
import torch
from exhaustive import exhaustive
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import xkv_fx
from xkv_fx.evaluation.texts import documentation
from xkv_fx.hf.generation import BudgetedLM
from xkv_fx.hf.models import load_model

pytestmark = exhaustive

LAYERS, KV_HEADS, CAPACITY, TOKENS = 30, 3, 48, 200
Layer = tuple[Tensor, Tensor, Tensor, Tensor]
"""Queries `[9, S, 64]`, keys and values `[3, S, 64]`, queries and keys rotated; the queries before that."""


@pytest.fixture(scope="module")
def layers_and_llm() -> tuple[list[Layer], BudgetedLM, Tensor]:
    model, tokenizer = load_model("smollm2")
    ids = torch.tensor(tokenizer(documentation()[:4000])["input_ids"][:TOKENS])[None]
    llm = xkv_fx.transform(model, xkv_fx.Budgets.uniform(LAYERS, CAPACITY), backend="eager")
    seen: list[Layer] = []
    projected: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: projected.append(out[0].double()))

    def recording(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        unrotated = projected[-1].view(TOKENS, -1, 64).transpose(0, 1)
        seen.append((q[0].double(), k[0].double(), v[0].double(), unrotated))
        return sdpa_attention_forward(module, q, k, v, *args, **kwargs)

    AttentionInterface.register("recording", recording)
    model.set_attn_implementation("recording")
    with torch.no_grad():
        model(ids, use_cache=False)
    return seen, llm, ids


def paid(layer: Layer) -> Tensor:
    return by_hand.attention_weights(layer[0], layer[1], 64**-0.5)


def snapkv(layer: Layer) -> Tensor:
    return by_hand.snapkv_scores(paid(layer), KV_HEADS)


def h2o(layer: Layer) -> Tensor:
    return paid(layer).sum(1).view(KV_HEADS, -1, TOKENS).mean(1)


def tova(layer: Layer) -> Tensor:
    return paid(layer)[:, -1].mean(0).expand(KV_HEADS, -1)


def streaming(layer: Layer) -> Tensor:
    order = torch.arange(TOKENS, dtype=torch.float64)
    order[:4] = torch.tensor([1e9, 1e8, 1e7, 1e6])
    return order.expand(KV_HEADS, -1)


def key_norm(layer: Layer) -> Tensor:
    return -layer[1].square().sum(-1).sqrt()


def key_diff(layer: Layer) -> Tensor:
    unit = layer[1] / layer[1].square().sum(-1, keepdim=True).sqrt()
    mean = unit.mean(1, keepdim=True)
    return -(unit * mean).sum(-1) / mean.square().sum(-1).sqrt()


def expected_attention(layer: Layer) -> Tensor:
    """arXiv 2510.00636, without the first 4 tokens; elements i and i + 32 turn by position / 100000 ** (i / 32)."""
    angle = torch.outer(TOKENS + torch.arange(512).double(), 100000.0 ** (-torch.arange(32).double() / 32))
    cos, sin = torch.diag(angle.cos().mean(0)), torch.diag(angle.sin().mean(0))
    rotation = torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))
    scores = torch.zeros(KV_HEADS, TOKENS, dtype=torch.float64)
    for head, queries in enumerate(layer[3]):
        mean = rotation @ queries[4:].mean(0)
        covariance = rotation @ torch.cov(queries[4:].T, correction=0) @ rotation.T
        keys = layer[1][head // 3, 4:]
        logits = keys @ mean / 8 + ((keys @ covariance) * keys).sum(1) / 128
        scores[head // 3, 4:] += torch.softmax(logits, 0) / 3
    scores *= layer[2].square().sum(-1).sqrt()
    scores[:, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0]) * 1e9
    return scores


def value_norm(layer: Layer) -> Tensor:
    return snapkv(layer) * layer[2].abs().sum(-1)


@pytest.mark.parametrize("formula", [snapkv, h2o, tova, streaming, key_norm, key_diff, value_norm, expected_attention])
def test_it_keeps_what_its_formula_chooses(
    layers_and_llm: tuple[list[Layer], BudgetedLM, Tensor], formula: Callable[[Layer], Tensor]
) -> None:
    layers, llm, ids = layers_and_llm
    policy = xkv_fx.Policy(scorer=formula.__name__)
    chooser = llm.with_budgets(xkv_fx.Budgets.uniform(LAYERS, CAPACITY, policy))
    session = chooser.new_session()
    chooser(ids, past_key_values=session, logits_to_keep=1)
    recent = by_hand.default_recent(CAPACITY)
    for index, layer in enumerate(layers):
        scores = formula(layer)
        for head, kept in enumerate(session.kept_positions(index)[0].tolist()):
            assert len(set(kept)) == CAPACITY
            chosen = by_hand.survivors(scores, CAPACITY, recent)[head]
            assert_same_but_for_ties(scores[head], set(kept), set(chosen), (index, head))


def assert_same_but_for_ties(scores: Tensor, kept: set[int], chosen: set[int], where: tuple[int, int]) -> None:
    """Float32 may swap tokens whose scores differ by less than it can tell."""
    lost, gained = sorted(chosen - kept), sorted(kept - chosen)
    assert len(lost) == len(gained), where
    if lost:
        missed = float(scores[lost].max() - scores[gained].min())
        assert missed <= 1e-5 * float(scores.abs().max()), (where, missed)
