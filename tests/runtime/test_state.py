"""The tensors of a session: shapes, bytes, forgetting, copies."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from xkv_fx import Budgets
from xkv_fx.errors import BudgetError
from xkv_fx.layers import LayerSpec
from xkv_fx.policy import Eviction, Policy
from xkv_fx.runtime.slots import EMPTY, slot_plans
from xkv_fx.runtime.state import CachePlan, State

GQA = LayerSpec(query_heads=4, kv_heads=2, key_dim=8, value_dim=8, itemsize=4)
MLA = LayerSpec(query_heads=4, kv_heads=1, key_dim=12, value_dim=5, itemsize=4)
SLIDING = dataclasses.replace(GQA, sliding_window=6)
LAYERS = (GQA, MLA, SLIDING)
CAPACITIES = (16, 3, 40)


def cache_plan(
    eviction: Eviction = "ring", rows: int = 3, dtype: torch.dtype = torch.float32, room: int = 0
) -> tuple[CachePlan, Budgets]:
    budgets = Budgets(CAPACITIES, Policy(eviction=eviction))
    slots = slot_plans(budgets, LAYERS, room)
    return CachePlan(LAYERS, slots, rows, dtype, torch.device("cpu")), budgets


def ordinals(plan: CachePlan, state: State, layer: int) -> Tensor:
    cache = plan.caches[layer]
    return cache.ordinals(state.of(cache), state.of(plan.counters))


def filled(plan: CachePlan) -> State:
    """A state in which every element of every tensor differs between rows."""
    state = plan.allocate()
    for index, tensor in enumerate(state.tensors):
        flat = torch.arange(tensor.numel()).reshape(tensor.shape)
        tensor.copy_((flat + 1000 * index) % 30_000)
    return state


def test_shapes_and_names() -> None:
    plan, _ = cache_plan("append", room=4)
    state = plan.allocate()
    assert plan.names() == (
        *("k_0", "v_0", "positions_0", "k_1", "v_1", "positions_1", "k_2", "v_2", "positions_2"),
        *("seen", "base"),
    )
    got = {name: (tuple(state[name].shape), state[name].dtype) for name in plan.names()}
    assert got == {
        "k_0": ((3, 2, 20, 8), torch.float32),
        "v_0": ((3, 2, 20, 8), torch.float32),
        "positions_0": ((3, 2, 20), torch.int32),
        "k_1": ((3, 1, 7, 12), torch.float32),
        "v_1": ((3, 1, 7, 5), torch.float32),
        "positions_1": ((3, 1, 7), torch.int32),
        "k_2": ((3, 2, 6, 8), torch.float32),  # clamped to the sliding window, which needs no room
        "v_2": ((3, 2, 6, 8), torch.float32),
        "positions_2": ((3, 2, 6), torch.int32),
        "seen": ((3,), torch.int64),
        "base": ((3,), torch.int64),
    }
    for name, (shape, dtype) in got.items():
        buffer = plan.buffers[plan.names().index(name)]
        assert (buffer.shape, buffer.dtype) == (shape, dtype)
        assert state[name].is_contiguous()
        assert state[name] is state.tensors[plan.names().index(name)]


def test_a_new_state_has_seen_nothing() -> None:
    plan, _ = cache_plan()
    state = plan.allocate()
    for layer, slots in enumerate(plan.slots):
        assert not state[f"k_{layer}"].any()
        assert not state[f"v_{layer}"].any()
        assert (state[f"positions_{layer}"] == torch.arange(slots.slots)).all()
        assert (ordinals(plan, state, layer) == EMPTY).all()
    assert not state["seen"].any()
    assert not state["base"].any()


@pytest.mark.parametrize("eviction", ["ring", "append", "none", "scored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_bytes_are_the_planned_ones(eviction: Eviction, dtype: torch.dtype, rows: int) -> None:
    plan, budgets = cache_plan(eviction, rows, dtype, room=5)
    state = plan.allocate()
    planned = budgets.kv_bytes(LAYERS, batch_size=rows, dtype=dtype, max_new_tokens=5)
    assert state.kv_bytes == plan.kv_bytes == planned
    by_hand = sum(slots.slots * spec.slot_bytes(dtype) * rows for slots, spec in zip(plan.slots, LAYERS, strict=True))
    assert planned == by_hand
    everything = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors)
    assert state.state_bytes == plan.state_bytes == everything - planned
    positions = sum(slots.slots * spec.kv_heads * rows for slots, spec in zip(plan.slots, LAYERS, strict=True)) * 4
    assert state.state_bytes >= positions + 2 * 8 * rows


def test_reset_forgets_in_place() -> None:
    plan, _ = cache_plan()
    state, new = filled(plan), plan.allocate()
    where = [tensor.data_ptr() for tensor in state.tensors]
    state.reset()
    assert [tensor.data_ptr() for tensor in state.tensors] == where
    for name in plan.names():
        if not name.startswith(("k_", "v_")):
            assert torch.equal(state[name], new[name])
    for layer in range(3):
        assert (ordinals(plan, state, layer) == EMPTY).all()


def test_clone_is_independent() -> None:
    plan, _ = cache_plan()
    state = filled(plan)
    twin = state.clone()
    assert twin.states == plan.states
    before = [tensor.clone() for tensor in state.tensors]
    for tensor, copy in zip(state.tensors, twin.tensors, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor.untyped_storage().data_ptr() != copy.untyped_storage().data_ptr()
        copy.fill_(7)
    for tensor, copy in zip(state.tensors, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [2, 2, 0]], ids=str)
def test_reorder_copies_rows_in_place(rows: list[int]) -> None:
    plan, _ = cache_plan()
    state = filled(plan)
    before: list[Tensor] = [tensor.clone() for tensor in state.tensors]
    where = [tensor.data_ptr() for tensor in state.tensors]
    state.reorder(torch.tensor(rows))
    assert [tensor.data_ptr() for tensor in state.tensors] == where
    for tensor, copy in zip(state.tensors, before, strict=True):
        assert torch.equal(tensor, copy[rows])


def test_ordinals_are_the_slots_plans() -> None:
    plan, _ = cache_plan(rows=1)
    state = plan.allocate()
    state["positions_1"].copy_(torch.tensor([[[4, 7, 9]]]))
    state["seen"].fill_(10)
    state["base"].fill_(10)
    assert ordinals(plan, state, 1).tolist() == [[[4, 7, 9]]]
    state["seen"].fill_(12)
    assert ordinals(plan, state, 1).tolist() == [[[4, 7, 11]]]  # a ring of one


@pytest.mark.parametrize("capacity", [10**14, 2**60, 10**20])
def test_more_than_memory_is_a_budget_error(capacity: int) -> None:
    budgets = Budgets((capacity,))
    plan = CachePlan((GQA,), slot_plans(budgets, (GQA,)), 1, torch.float32, torch.device("cpu"))
    assert plan.kv_bytes == budgets.kv_bytes((GQA,))
    with pytest.raises(BudgetError, match=r"bytes of KV cache for 1 rows.*smaller budgets"):
        plan.allocate()
