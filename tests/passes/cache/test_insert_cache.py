"""The three graphs that use a cache: what they compute, and what they leave in the buffers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from batches import padded, positions_of
from by_hand import attention_weights, default_recent, snapkv_scores, survivors
from graph_checks import assert_meta_is_true, attention_inputs
from ready_models import cache_plan, captured
from tiny_models import random_ids
from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.errors import PassError
from xkv_fx.passes.cache.insert_decode_cache import InsertDecodeCache
from xkv_fx.passes.cache.insert_prefill_cache import InsertPrefillCache
from xkv_fx.passes.pipeline import decode_pipeline, extend_pipeline, prefill_pipeline, run_pipeline
from xkv_fx.passes.prepare.clean_graph import CleanGraph
from xkv_fx.passes.tools.graph import calls, placeholders
from xkv_fx.policy import Eviction, Policy
from xkv_fx.runtime.scorers import PromptView, SnapKV
from xkv_fx.runtime.state import CachePlan, State

ROWS = [random_ids(1, length, seed=length) for length in (9, 21)]
FULL = (64, 64, 64)
TIGHT = (12, 16, 12)


def plan_of(capacities: Sequence[int], policy: Policy | None = None, room: int = 0) -> CachePlan:
    return cache_plan(captured(), tuple(capacities), policy, room)


@functools.cache
def prefill_graph(plan: CachePlan, all_logits: bool = True) -> GraphModule:
    source = captured().graph("prompt")
    return run_pipeline(source, prefill_pipeline(plan, SnapKV(), all_logits)).module


@functools.cache
def extend_graph(plan: CachePlan) -> GraphModule:
    source = captured().graph("prompt")
    return run_pipeline(source, extend_pipeline(plan, SnapKV(), all_logits=True)).module


@functools.cache
def decode_graph(plan: CachePlan) -> GraphModule:
    return run_pipeline(captured().graph("token"), decode_pipeline(plan)).module


@dataclasses.dataclass(frozen=True)
class EveryThird:
    """Plain Python, as a user may write it: it counts tokens, loops over them, and does something else for a few."""

    paper: ClassVar[str] = ""
    looks_at_question: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    measures_attention: ClassVar[bool] = False

    def __call__(self, prompt: PromptView) -> Tensor:
        scores = torch.zeros(*prompt.k.shape[:2], prompt.ordinals.shape[2])
        for candidate in range(scores.shape[2]):
            ordinal = prompt.ordinals[:, :, candidate]
            scores[:, :, candidate] = by_third(ordinal) if prompt.k.shape[2] > 4 else -ordinal.float()
        return scores / int(prompt.q.shape[2])


def by_third(ordinals: Tensor) -> Tensor:
    return (ordinals % 3 == 0).float() - ordinals / 1000


def run(graph: GraphModule, ids: Tensor, positions: Tensor, state: State, valid: Tensor | None = None) -> Tensor:
    padding = () if valid is None else (valid,)
    with torch.no_grad():
        logits: Tensor = graph(ids, positions, *padding, *state.tensors)
    return logits


def ordinals(plan: CachePlan, state: State, layer: int) -> Tensor:
    cache = plan.caches[layer]
    return cache.ordinals(state.of(cache), state.of(plan.counters))


def dirty(state: State) -> State:
    """The same state, as a session of another life left it."""
    for name, tensor in zip((buffer.name for buffer in state.buffers), state.tensors, strict=True):
        tensor.fill_(3 if name in ("seen", "base") else 7)
    return state


def uncached(ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
    with torch.no_grad():
        logits: Tensor = captured().prompt(ids, positions)
    return logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_leaves_the_survivors_of_each_layer_and_row(side: str) -> None:
    plan = plan_of(TIGHT)
    state = dirty(plan.allocate())
    ids, valid = padded(ROWS, side)
    run(prefill_graph(plan), ids, positions_of(valid), state, valid)
    assert state["seen"].tolist() == state["base"].tolist() == [9, 21]
    for row, prompt in enumerate(ROWS):
        positions = torch.arange(prompt.shape[1]).expand(2, -1)
        inputs = attention_inputs(captured().prompt, prompt.expand(2, -1), positions)
        for layer, (q, k, v) in enumerate(inputs):
            capacity = TIGHT[layer]
            scores = snapkv_scores(attention_weights(q[0], k[0], 8**-0.5), kv_heads=2)
            expected = survivors(scores, capacity, default_recent(capacity))
            kept = ordinals(plan, state, layer)[row]
            for head in range(2):
                slots = [slot for slot in range(capacity) if kept[head, slot] >= 0]
                assert sorted(kept[head, slots].tolist()) == expected[head]
                for held, all_of_them in ((state[f"k_{layer}"], k), (state[f"v_{layer}"], v)):
                    wanted = all_of_them[0, head, kept[head, slots]]
                    torch.testing.assert_close(held[row, head, slots], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [13, 24, 41])
def test_a_scorer_may_count_and_branch_on_tokens(length: int) -> None:
    """The graphs were captured with 24 tokens, and a scorer that asks for their number must not settle on it."""
    plan, ids = plan_of(TIGHT), random_ids(2, length + 2)
    positions, everything = torch.arange(length + 2).expand(2, -1), torch.ones_like(ids, dtype=torch.bool)
    source = captured().graph("prompt")
    prefill = run_pipeline(source, prefill_pipeline(plan, EveryThird(), all_logits=True)).module
    source = captured().graph("prompt")
    extend = run_pipeline(source, extend_pipeline(plan, EveryThird(), all_logits=True)).module
    by_score = by_third(torch.arange(length)).expand(2, -1)

    state, one = dirty(plan.allocate()), slice(0, length)
    logits = run(prefill, ids[:, one], positions[:, one], state, everything[:, one])
    torch.testing.assert_close(logits, uncached(ids[:, one]), atol=1e-4, rtol=0)
    assert_kept(state, by_score)
    assert_meta_is_true(prefill, ids[:, one], positions[:, one], everything[:, one], *plan.allocate().tensors)

    state = plan.allocate()
    for part in (slice(0, 9), slice(9, length)):  # nothing is evicted from the first nine tokens
        run(prefill if part.start == 0 else extend, ids[:, part], positions[:, part], state, everything[:, part])
    if length - 9 > 4:
        assert_kept(state, by_score)
    else:
        assert_kept(state, -torch.arange(length).float().expand(2, -1))
    rest = slice(9, length)
    assert_meta_is_true(extend, ids[:, rest], positions[:, rest], everything[:, rest], *plan.allocate().tensors)


def assert_kept(state: State, scores: Tensor) -> None:
    """Every row's layers hold the survivors of one prompt; scores `[kv_heads, S]`."""
    for layer, capacity in enumerate(TIGHT):
        expected = survivors(scores, capacity, default_recent(capacity))
        for row in range(2):
            held = ordinals(plan_of(TIGHT), state, layer)[row].tolist()
            assert [sorted(ordinal for ordinal in head if ordinal >= 0) for head in held] == expected


def test_prefill_does_not_change_the_logits() -> None:
    plan = plan_of(TIGHT)
    ids, valid = padded(ROWS, "left")
    graph = prefill_graph(plan, all_logits=False)
    last = run(graph, ids, positions_of(valid), dirty(plan.allocate()), valid)
    for row, prompt in enumerate(ROWS):
        torch.testing.assert_close(last[row], uncached(prompt.expand(2, -1))[0, -1:], atol=1e-4, rtol=0)
    assert_meta_is_true(graph, ids, positions_of(valid), valid, *plan.allocate().tensors)


@pytest.mark.parametrize(("eviction", "room"), [("none", 0), ("ring", 0), ("append", 5)])
def test_with_room_for_all_tokens_the_three_graphs_compute_what_one_does(eviction: Eviction, room: int) -> None:
    plan = plan_of(FULL, Policy(eviction=eviction), room)
    state = dirty(plan.allocate())
    ids = random_ids(2, 24)
    positions = torch.arange(24).expand(2, -1)
    everything = torch.ones_like(ids, dtype=torch.bool)
    parts = [run(prefill_graph(plan), ids[:, :10], positions[:, :10], state, everything[:, :10])]
    parts.append(run(extend_graph(plan), ids[:, 10:17], positions[:, 10:17], state, everything[:, 10:17]))
    decode = decode_graph(plan)
    parts += [run(decode, ids[:, t : t + 1], positions[:, t : t + 1], state) for t in range(17, 20)]
    parts.append(run(extend_graph(plan), ids[:, 20:21], positions[:, 20:21], state, everything[:, 20:21]))
    parts += [run(decode, ids[:, t : t + 1], positions[:, t : t + 1], state) for t in range(21, 24)]
    torch.testing.assert_close(torch.cat(parts, 1), uncached(ids), atol=1e-4, rtol=0)
    assert state["seen"].tolist() == [24, 24]
    assert state["base"].tolist() == [21, 21]


def test_extending_leaves_a_row_without_new_tokens_alone() -> None:
    plan = plan_of(TIGHT)
    state = plan.allocate()
    ids, valid = padded(ROWS, "left")
    run(prefill_graph(plan), ids, positions_of(valid), state, valid)
    run(decode_graph(plan), random_ids(2, 1), torch.tensor([[9], [21]]), state)  # seen is now more than base
    before = state.clone()
    turn, mask = random_ids(2, 5), torch.tensor([[False] * 5, [True] * 5])
    graph = extend_graph(plan)
    run(graph, turn, torch.arange(22, 27).expand(2, -1), state, mask)
    for name in plan.names():
        assert torch.equal(state[name][0], before[name][0]), name
        assert not torch.equal(state[name][1], before[name][1]), name
    assert_meta_is_true(graph, turn, turn, mask, *plan.allocate().tensors)


def test_decode_writes_one_slot_of_each_layer() -> None:
    """With 21 tokens in C slots, a ring of r: token t overwrites slot C - r + (t - C) mod r."""
    plan = plan_of(TIGHT)
    state = plan.allocate()
    ids, valid = padded(ROWS, "left")
    run(prefill_graph(plan), ids, positions_of(valid), state, valid)
    graph = decode_graph(plan)
    for step in range(6):
        before = state.clone()
        run(graph, random_ids(2, 1, seed=step), torch.tensor([[9 + step], [21 + step]]), state)
        for layer, capacity in enumerate(TIGHT):
            recent = default_recent(capacity)
            for row, token in enumerate((9 + step, 21 + step)):
                slot = token if token < capacity else capacity - recent + (token - capacity) % recent
                for kind in "kv":
                    changed = (state[f"{kind}_{layer}"] != before[f"{kind}_{layer}"])[row].any(-1)
                    assert changed.nonzero()[:, 1].unique().tolist() == [slot]
                    assert changed[:, slot].all()
            assert torch.equal(state[f"positions_{layer}"], before[f"positions_{layer}"])
        assert state["seen"].tolist() == [10 + step, 22 + step]
        assert state["base"].tolist() == [9, 21]
    assert_meta_is_true(graph, random_ids(2, 1), random_ids(2, 1), *plan.allocate().tensors)


@pytest.mark.parametrize(
    ("capacities", "groups"), [((12, 12, 12), {12}), (TIGHT, {12, 16}), ((8, 9, 10), {8, 9, 10})], ids=str
)
def test_equal_layers_share_slot_and_mask(capacities: tuple[int, ...], groups: set[int]) -> None:
    graph = decode_graph(plan_of(capacities))
    for prefix in ("slot_of_", "mask_of_"):
        shared = [node for node in graph.graph.nodes if node.name.startswith(prefix)]
        assert {node.name for node in shared} == {f"{prefix}{capacity}" for capacity in groups}
        for node in shared:
            uses = [user for user in node.users if user.target is torch.ops.xkv.decode_attention.default]
            assert len(uses) == capacities.count(int(node.name.removeprefix(prefix)))


def test_state_follows_the_inputs_in_the_plans_order() -> None:
    plan = plan_of(TIGHT)
    state = list(plan.names())
    assert list(placeholders(prefill_graph(plan).graph)) == ["input_ids", "position_ids", "valid", *state]
    assert list(placeholders(extend_graph(plan).graph)) == ["input_ids", "position_ids", "valid", *state]
    assert list(placeholders(decode_graph(plan).graph)) == ["input_ids", "position_ids", *state]


def test_a_plan_of_other_layers_is_refused_and_names_the_attentions() -> None:
    module = captured().graph("token")
    names = ", ".join(node.name for node in calls(module, torch.ops.xkv.attention.default))
    plan = cache_plan(captured("gemma2", 2), (12, 16))
    with pytest.raises(PassError, match=rf"3 attention nodes \({names}\) are not the 2 planned caches"):
        InsertDecodeCache(plan)(module)


def test_prefill_needs_the_pass_that_counts_valid_tokens() -> None:
    module = captured().graph("prompt")
    CleanGraph()(module)
    with pytest.raises(PassError, match="no node of the graph has the role 'length'"):
        InsertPrefillCache(plan_of(TIGHT), SnapKV())(module)
