"""What Expected Attention keeps in a model, against its formula over the model's own projections and rotary angles."""

from __future__ import annotations

import dataclasses
import math

import by_hand
import pytest
import ready_models
import torch
from batches import padded
from tiny_models import random_ids
from torch import Tensor
from transformers import LlamaForCausalLM

import xkv_fx
from xkv_fx.errors import PassError
from xkv_fx.planning.measure.continuation import cut_model, run_full
from xkv_fx.runtime.scorers import scorer_of
from xkv_fx.runtime.session import Session
from xkv_fx.runtime.slots import slot_plans

CAPACITY, LAYERS = 16, 2
OPTIONS = {"future_positions": 30, "epsilon": 0.02, "sinks": 2}
POLICY = xkv_fx.Policy(scorer="expected_attention", scorer_options=OPTIONS, recent=3)


@dataclasses.dataclass(frozen=True)
class Projected:
    """One layer on one row: queries before rotation `[4, S, 8]`, keys rotated and values `[2, S, 8]`, float64."""

    queries: Tensor
    keys: Tensor
    values: Tensor


def rotated(x: Tensor, position: Tensor) -> Tensor:
    """Llama's rotary embedding: elements i and i + 4 are rotated by position / 10000 ** (i / 4)."""
    angle = position.double()[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
    first, second = x.double().split(4, -1)
    return torch.cat((first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()), -1)


def projected(model: LlamaForCausalLM, ids: Tensor) -> list[Projected]:
    """What the projections of each layer make of a row of tokens, with the full cache."""
    seen: dict[tuple[int, str], Tensor] = {}
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda module, args, out, key=(index, name): seen.__setitem__(key, out[0])  # type: ignore[misc]
        )
        for index, layer in enumerate(model.model.layers)
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()

    def heads(index: int, name: str) -> Tensor:
        flat = seen[index, name]
        return flat.view(len(flat), -1, 8).transpose(0, 1).double()

    position = torch.arange(ids.shape[1])
    return [
        Projected(heads(index, "q_proj"), rotated(heads(index, "k_proj"), position), heads(index, "v_proj"))
        for index in range(len(model.model.layers))
    ]


def expected_attention(layer: Projected, asked_from: int) -> Tensor:
    """Scores `[2, S]` by the statistics of the queries from `asked_from` on. The mean rotation is found by turning the
    mean and each vector that makes up the covariance to each of the next positions."""
    total = layer.keys.shape[1]
    coming = total + torch.arange(OPTIONS["future_positions"])
    scores = torch.zeros(2, total, dtype=torch.float64)
    for query_head, queries in enumerate(layer.queries):
        asked = queries[max(asked_from, int(OPTIONS["sinks"])) :]
        mean, covariance = asked.mean(0), torch.cov(asked.T, correction=0)
        everywhere = torch.stack([rotated(vector.expand(len(coming), -1), coming).mean(0) for vector in torch.eye(8)])
        mean, covariance = mean @ everywhere, everywhere.T @ covariance @ everywhere
        keys = layer.keys[query_head // 2, int(OPTIONS["sinks"]) :]
        logits = keys @ mean / math.sqrt(8) + torch.einsum("ki,ij,kj->k", keys, covariance, keys) / 16
        scores[query_head // 2, int(OPTIONS["sinks"]) :] += torch.softmax(logits, 0) / 2
    scores = (scores + OPTIONS["epsilon"]) * layer.values.norm(dim=-1)
    scores[:, : int(OPTIONS["sinks"])] = torch.tensor([3e9, 2e9])[: int(OPTIONS["sinks"])]
    return scores


def chosen(ids: Tensor, capacity: int = CAPACITY, asked_from: int = 0) -> list[list[list[int]]]:
    """What each layer and head keeps of a row of tokens."""
    layers = projected(ready_models.model(), ids)
    return [by_hand.survivors(expected_attention(layer, asked_from), capacity, 3) for layer in layers]


def session_of(rows: int, capacity: int = CAPACITY) -> Session:
    return Session(ready_models.transformed(xkv_fx.Budgets.uniform(LAYERS, capacity, POLICY), rows).program)


def kept(session: Session, row: int = 0) -> list[list[list[int]]]:
    return [session.ordinals(index)[row].sort(-1).values.tolist() for index in range(LAYERS)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_padded_batch_keeps_what_the_formula_chooses(side: str) -> None:
    rows = [random_ids(1, length, seed=length) for length in (60, 37)]
    ids, valid = padded(rows, side)
    session = session_of(2)
    session.feed(ids, valid=valid)
    for index, row in enumerate(rows):
        assert kept(session, index) == chosen(row), index


def test_an_extension_is_judged_by_its_own_queries() -> None:
    """The first chunk fits, so that nothing is lost before the second one; then all are candidates."""
    ids = random_ids(1, 50, seed=1)
    session = session_of(1, 24)
    session.feed(ids[:, :20])
    session.feed(ids[:, 20:])
    assert kept(session) == chosen(ids, 24, asked_from=20) != chosen(ids, 24)


def test_a_padded_extension() -> None:
    """Row 1 gains nothing and stays as it is; row 0 is judged by its new queries."""
    ids = random_ids(2, 50, seed=2)
    session = session_of(2, 24)
    session.feed(ids[:, :20])
    before = kept(session, 1)
    session.feed(ids[:, 20:], valid=torch.tensor([True, False])[:, None].expand(-1, 30))
    assert kept(session) == chosen(ids[:1], 24, asked_from=20)
    assert kept(session, 1) == before


def test_positions_of_the_users_own() -> None:
    """Far from where ordinals are, the coming positions are those behind the newest position id."""
    ids = random_ids(1, 40, seed=4)
    moved = session_of(1)
    moved.feed(ids, position_ids=300 + torch.arange(40)[None])
    assert kept(moved) == chosen(ids)  # logits depend on distances alone


def test_measured_plans_run_the_same_scorer() -> None:
    """Calibrating runs prompts in pieces of its own; what it keeps is what serving keeps."""
    ids = random_ids(1, 60, seed=60)
    budgets = xkv_fx.Budgets.uniform(LAYERS, CAPACITY, POLICY)
    source = ready_models.captured("llama", LAYERS, 1)
    scorer = scorer_of(POLICY)
    with pytest.raises(PassError, match="was not cut for ExpectedAttention"):
        run_full(cut_model(source), scorer, ids, 4)
    run = run_full(cut_model(source, scorer), scorer, torch.cat((ids, random_ids(1, 4)), 1), 4)
    session = session_of(1)
    session.feed(ids)
    served = kept(session)
    for index, plan in enumerate(slot_plans(budgets, source.layers)):
        survivors = by_hand.survivors(run.layers[index].scores[0].double(), plan.capacity, plan.recent)
        assert survivors == served[index]
