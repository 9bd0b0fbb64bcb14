"""A layer whose KV heads have several caches is one call of the CPU kernels, and computes what its attentions did."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from ready_models import cache_plan
from tiny_models import FAMILIES, random_ids
from torch import Tensor

from xkv_fx.budgets import Capacity
from xkv_fx.hf.capture import CapturedModel, capture
from xkv_fx.lowering.kernels.table import choose_kernels
from xkv_fx.lowering.lift_weights import lift_weights
from xkv_fx.lowering.program import CompiledProgram, Graphs
from xkv_fx.passes.tools.graph import calls
from xkv_fx.policy import Policy
from xkv_fx.runtime.scorers import scorer_of
from xkv_fx.runtime.session import Session

HEADS = torch.ops.xkv.decode_heads_cpu.default
ALONE = torch.ops.xkv.decode_attention_cpu.default
CODED = torch.ops.xkv.decode_coded_cpu.default
SCORED = torch.ops.xkv.decode_coded_scored_cpu.default
PAIR = ("int8", "int4")


@functools.cache
def captured(family: str) -> CapturedModel:
    heads = {"hidden_size": 48, "head_dim": 16, "num_attention_heads": 6, "num_key_value_heads": 3}
    return capture(FAMILIES[family](2, **heads), rows=2, check=False)


def graphs(family: str, capacities: tuple[Capacity, ...], formats: Any, eviction: Any) -> Graphs:
    policy = Policy(eviction=eviction)
    plan = cache_plan(captured(family), capacities, policy, max_new_tokens=4, formats=formats)
    return Graphs(captured(family), plan, scorer_of(policy))


@pytest.mark.parametrize(
    ("family", "capacities", "formats", "eviction", "expected"),
    [
        ("llama", ((14, 20, 14), (9, 7, 12)), None, "append", {HEADS: 2}),  # heads that are no neighbours, and that are
        ("llama", ((14, 20, 14), (9, 7, 12)), (PAIR, PAIR), "ring", {HEADS: 2}),
        ("llama", ((14, 20, 14), 12), (PAIR, (None, PAIR, ("int4", "int4"))), "append", {HEADS: 2}),
        ("llama", (14, (14, 20, 20)), (PAIR, PAIR), "append", {HEADS: 1, CODED: 1}),
        ("gemma2", ((6, 20, 7), (14, 20, 14)), (None, PAIR), "ring", {HEADS: 2}),  # soft-capped logits, windows
        ("gpt_oss", ((6, 20, 7), (14, 20, 14)), (PAIR, None), "ring", {HEADS: 2}),  # sink logits
        ("llama", ((14, 20, 14), 14), (PAIR, PAIR), "scored", {SCORED: 3}),
        ("llama", ((14, 20, 14), 14), ((PAIR, ("fp8", "fp8"), PAIR), None), "append", {CODED: 1, ALONE: 1}),
    ],
)
def test_a_layer_is_one_call_where_the_kernels_serve_all_of_its_caches(
    family: str, capacities: Any, formats: Any, eviction: Any, expected: dict[Any, int]
) -> None:
    made = graphs(family, capacities, formats, eviction)
    lifted, weights = lift_weights(made.decode)
    choose_kernels(lifted)
    assert {op: len(calls(lifted, op)) for op in (HEADS, ALONE, CODED, SCORED) if calls(lifted, op)} == expected
    lifted.graph.lint()

    session = Session(CompiledProgram(made, "eager"))
    session.feed(random_ids(2, 23), valid=torch.tensor([[True] * 23, [False] * 6 + [True] * 17]))
    tensors = session.state.clone().tensors
    for seed in range(3):
        ids, positions = random_ids(2, 1, seed=seed), session.state.of(made.plan.counters)["seen"][:, None]
        got = lifted(*weights.values(), ids, positions.clone(), *tensors)
        torch.testing.assert_close(got, session.step(ids), rtol=2e-4, atol=2e-4)


def conversation(session: Session) -> list[Tensor]:
    logits = [session.feed(random_ids(2, 23), valid=torch.tensor([[True] * 23, [False] * 6 + [True] * 17]))]
    return logits + [session.step(random_ids(2, 1, seed=seed)) for seed in range(4)]


def test_compiled_it_computes_the_same() -> None:
    made = graphs("gpt_oss", ((6, 20, 7), (14, 20, 14)), (PAIR, None), "ring")
    compiled, eager = (CompiledProgram(made, backend) for backend in ("inductor", "eager"))
    for got, expected in zip(*map(conversation, map(Session, (compiled, eager))), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
