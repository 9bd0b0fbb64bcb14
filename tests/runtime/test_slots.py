"""Slots, ordinals and masks as functions of counters, against decoding one token after the other into a list."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from oracles import reference_ordinals, reference_slot
from torch import Tensor

from xkv_fx import Budgets
from xkv_fx.errors import BudgetError, CapacityError
from xkv_fx.layers import LayerSpec
from xkv_fx.policy import Eviction, Policy
from xkv_fx.runtime.slots import EMPTY, SlotPlan, slot_plans

HEADS = 2


def ring(capacity: int, recent: int, sinks: int = 0, sliding_window: int | None = None) -> SlotPlan:
    return SlotPlan(capacity, capacity, recent, sinks, "ring", sliding_window)


def append(capacity: int, room: int, recent: int = 1, sliding_window: int | None = None) -> SlotPlan:
    return SlotPlan(capacity, capacity + room, recent, 0, "append", sliding_window)


def full(capacity: int) -> SlotPlan:
    return SlotPlan(capacity, capacity, max(1, capacity // 4), 0, "none")


def prefilled(base: int, plan: SlotPlan, generator: torch.Generator) -> list[int]:
    """What a prefill of `base` tokens may leave in the slots of one head: sorted survivors, the newest in the ring."""
    if base <= plan.capacity:
        return list(range(base)) + [EMPTY] * (plan.slots - base)
    older = (
        torch.randperm(base - plan.recent, generator=generator)[: plan.capacity - plan.recent].sort().values.tolist()
    )
    held = [*older, *range(base - plan.recent, base)]
    if plan.eviction == "ring":
        for token in range(base - plan.recent, base):
            held[plan.capacity - plan.recent + (token - plan.capacity) % plan.recent] = token
    return held + [EMPTY] * (plan.slots - plan.capacity)


def positions_of(held: list[list[list[int]]]) -> Tensor:
    """The positions that a prefill writes: free slots hold their own number."""
    rows = torch.tensor(held, dtype=torch.int32)
    return torch.where(rows == EMPTY, torch.arange(rows.shape[2], dtype=torch.int32), rows)


def check_decode(plan: SlotPlan, bases: list[int], steps: int, seed: int = 0) -> None:
    """Decode `steps` tokens after prefills of `bases` tokens and compare every function of the plan at every step."""
    generator = torch.Generator().manual_seed(seed)
    held = [[prefilled(base, plan, generator) for _ in range(HEADS)] for base in bases]
    positions, base = positions_of(held), torch.tensor(bases)
    for step in range(steps):
        seen = base + step
        counts = [plan.slots - row[0].count(EMPTY) for row in held]
        assert plan.count(seen, base).tolist() == counts
        assert plan.ordinals(positions, seen, base).tolist() == held
        check_extend_mask(plan, positions, seen, base, held, plan.sliding_window)

        slots = [reference_slot(row[0], plan) for row in held]
        assert plan.next_slot(seen, base).tolist() == slots
        for row, slot, token in zip(held, slots, seen.tolist(), strict=True):
            assert all(reference_slot(head, plan) == slot for head in row)
            for head in row:
                head[slot] = token
        mask = plan.decode_mask(positions, seen, base)
        assert mask.dtype == torch.bool
        assert mask.expand(len(bases), HEADS, 1, plan.slots)[:, :, 0].tolist() == [
            [[in_reach(ordinal, token, plan.sliding_window) for ordinal in head] for head in row]
            for row, token in zip(held, seen.tolist(), strict=True)
        ]


def check_extend_mask(
    plan: SlotPlan,
    positions: Tensor,
    seen: Tensor,
    base: Tensor,
    held: list[list[list[int]]],
    sliding_window: int | None,
) -> None:
    """Check what three more tokens would read, in a layer with that sliding window."""
    mask = plan.extend_mask(positions, seen, base, 3)
    assert mask.dtype == torch.bool
    assert mask.shape[1] in (1, HEADS)
    assert mask.expand(len(held), HEADS, 3, plan.slots).tolist() == [
        [[[in_reach(ordinal, token + query, sliding_window) for ordinal in head] for query in range(3)] for head in row]
        for row, token in zip(held, seen.tolist(), strict=True)
    ]


def in_reach(ordinal: int, query: int, sliding_window: int | None) -> bool:
    return ordinal != EMPTY and ordinal <= query and (sliding_window is None or query - ordinal < sliding_window)


# Decode, token by token


@pytest.mark.parametrize("sliding_window", [None, 9, 14])
@pytest.mark.parametrize(
    ("capacity", "recent"), [(8, 3), (8, 1), (8, 8), (1, 1), (7, 2), (5, 4)], ids=lambda size: str(size)
)
def test_ring_turns(capacity: int, recent: int, sliding_window: int | None) -> None:
    bases = [1, 2, capacity - 1 or 3, capacity, capacity + 1, capacity + recent, 3 * capacity + 1]
    check_decode(ring(capacity, recent, sliding_window=sliding_window), bases, steps=3 * capacity + 5)


@pytest.mark.parametrize("sliding_window", [None, 9])
@pytest.mark.parametrize("capacity", [1, 4, 8])
def test_append(capacity: int, sliding_window: int | None) -> None:
    plan = append(capacity, room=6, sliding_window=sliding_window)
    check_decode(plan, [1, max(1, capacity - 2), capacity, capacity + 1, 3 * capacity + 2], steps=6)


@given(
    sizes=st.integers(2, 9).flatmap(lambda window: st.tuples(st.just(window), st.integers(1, window - 1))),
    bases=st.lists(st.integers(0, 25), min_size=1, max_size=3),
    recent=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@examples(40)
def test_append_in_a_whole_sliding_window_takes_turns(
    sizes: tuple[int, int], bases: list[int], recent: int, seed: int
) -> None:
    """Each token that is overwritten has left the window, which the reference demands of it."""
    window, capacity = sizes
    plan = SlotPlan(capacity, window, min(recent, capacity), 0, "append", sliding_window=window)
    assert plan.takes_turns
    check_decode(plan, bases, steps=3 * window, seed=seed)


def test_full() -> None:
    check_decode(full(12), [1, 4, 7], steps=5)


@given(
    sizes=st.integers(1, 12).flatmap(lambda capacity: st.tuples(st.just(capacity), st.integers(1, capacity))),
    bases=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    steps=st.integers(1, 30),
    sliding_window=st.none() | st.integers(13, 20),
    seed=st.integers(0, 99),
)
@examples(40)
def test_any_ring(sizes: tuple[int, int], bases: list[int], steps: int, sliding_window: int | None, seed: int) -> None:
    check_decode(ring(*sizes, sliding_window=sliding_window), bases, steps, seed=seed)


@given(
    sizes=st.integers(1, 10).flatmap(lambda capacity: st.tuples(st.just(capacity), st.integers(1, capacity))),
    bases=st.lists(st.integers(0, 25), min_size=1, max_size=3),
    room=st.integers(1, 9),
    sliding_window=st.none() | st.integers(11, 16),
)
@examples(20)
def test_any_append(sizes: tuple[int, int], bases: list[int], room: int, sliding_window: int | None) -> None:
    check_decode(append(sizes[0], room, sizes[1], sliding_window), bases, steps=room)


def test_ring_keeps_prompt_entries_and_the_newest() -> None:
    """After prefill only the last `recent` slots ever change, and they hold the newest `recent` tokens."""
    plan = ring(8, 3)
    held = prefilled(20, plan, torch.Generator().manual_seed(0))
    positions, base = positions_of([[held, held]]), torch.tensor([20])
    for seen in range(20, 60):
        ordinals = plan.ordinals(positions, torch.tensor([seen]), base)
        assert ordinals[0, 0, :5].tolist() == held[:5]
        assert sorted(ordinals[0, 0, 5:].tolist()) == [seen - 3, seen - 2, seen - 1]


def test_scored_reads_positions() -> None:
    """Decode writes the positions itself, so they are what the slots hold."""
    plan = SlotPlan(6, 6, 2, 0, "scored")
    positions = torch.tensor([[[9, 1, 4, 8, 2, 7]], [[0, 1, 2, 3, 4, 5]]], dtype=torch.int32)
    seen = torch.tensor([10, 4])
    assert plan.count(seen, seen).tolist() == [6, 4]
    ordinals = plan.ordinals(positions, seen, seen).tolist()
    assert ordinals == [[[9, 1, 4, 8, 2, 7]], [[0, 1, 2, 3, EMPTY, EMPTY]]]
    assert ordinals == [
        [reference_ordinals(row[0].tolist(), n, n, plan)] for row, n in zip(positions, [10, 4], strict=True)
    ]


def test_nothing_seen() -> None:
    for plan in (ring(4, 2), append(4, 2), full(4), SlotPlan(4, 4, 1, 0, "scored"), ring(4, 2, sliding_window=6)):
        none = torch.zeros(2, dtype=torch.int64)
        positions = torch.arange(plan.slots, dtype=torch.int32).expand(2, HEADS, -1)
        assert (plan.ordinals(positions, none, none) == EMPTY).all()
        assert not plan.extend_mask(positions, none, none, 2).any()
        assert plan.decode_mask(positions, none, none).expand(2, HEADS, 1, plan.slots)[..., 0].all()
        assert plan.decode_mask(positions, none, none).expand(2, HEADS, 1, plan.slots).sum() == 2 * HEADS


# The reference itself, on cases small enough to write down


def test_reference_slots() -> None:
    assert reference_slot([0, 1, EMPTY, EMPTY], ring(4, 2)) == 2
    assert reference_slot([0, 1, 2, 3], ring(4, 2)) == 2
    assert reference_slot([0, 1, 4, 3], ring(4, 2)) == 3
    assert reference_slot([7, 3, 5, 9], ring(4, 3)) == 2
    assert reference_ordinals([5, 6, 9, 8], seen=12, base=10, plan=ring(4, 2)) == [5, 6, 11, 10]
    assert reference_ordinals([0, 1, 2, 3, 4, 5], seen=5, base=3, plan=append(4, 2)) == [0, 1, 2, 3, 4, EMPTY]
    assert reference_ordinals([2, 5, 6, 7, 4, 5], seen=9, base=8, plan=append(4, 2)) == [2, 5, 6, 7, 8, EMPTY]
    assert reference_slot([2, 5, 6, 7], SlotPlan(3, 4, 1, 0, "append", sliding_window=4)) == 0
    with pytest.raises(CapacityError, match="never overwrites"):
        reference_slot([0, 1], full(2))
    with pytest.raises(CapacityError, match="never overwrites"):
        reference_slot([2, 5, 6], SlotPlan(2, 3, 1, 0, "append", sliding_window=7))
    with pytest.raises(BudgetError, match="scores"):
        reference_slot([0, 1], SlotPlan(2, 2, 1, 0, "scored"))


# Plans


SPEC = LayerSpec(query_heads=4, kv_heads=2, key_dim=8, value_dim=8, itemsize=4)
SLIDING = dataclasses.replace(SPEC, sliding_window=32)


@pytest.mark.parametrize("eviction", ["ring", "scored", "append", "none"])
def test_slot_plans_follow_policy_and_budgets(eviction: Eviction) -> None:
    budgets = Budgets((40, 8, 1), Policy(eviction=eviction, recent=6, sinks=4))
    room = 5 if eviction == "append" else 0
    assert slot_plans(budgets, (SPEC,) * 3, max_new_tokens=5) == (
        SlotPlan(40, 40 + room, 6, 4, eviction),
        SlotPlan(8, 8 + room, 6, 2, eviction),
        SlotPlan(1, 1 + room, 1, 0, eviction),
    )


@pytest.mark.parametrize("eviction", ["ring", "scored", "append", "none"])
@pytest.mark.parametrize("capacity", [32, 33, 500])
def test_a_whole_sliding_window_is_all_ring(eviction: Eviction, capacity: int) -> None:
    budgets = Budgets((capacity,), Policy(eviction=eviction, sinks=2))
    (plan,) = slot_plans(budgets, (SLIDING,), max_new_tokens=7)
    assert (plan.capacity, plan.slots, plan.recent, plan.sinks, plan.eviction) == (32, 32, 32, 0, "ring")


@pytest.mark.parametrize("eviction", ["ring", "scored", "append", "none"])
def test_less_than_a_sliding_window_is_masked_by_position(eviction: Eviction) -> None:
    (plan,) = slot_plans(Budgets((31,), Policy(eviction=eviction)), (SLIDING,), max_new_tokens=7)
    assert plan == SlotPlan(31, 32 if eviction == "append" else 31, 7, 0, eviction, sliding_window=32)
    (plan,) = slot_plans(Budgets((20,), Policy(eviction=eviction)), (SLIDING,), max_new_tokens=7)
    assert plan == SlotPlan(20, 27 if eviction == "append" else 20, 5, 0, eviction, sliding_window=32)


@pytest.mark.parametrize("capacity", [3, 5, 6, 20])
@pytest.mark.parametrize("eviction", ["ring", "append"])
def test_masks_of_planned_layers_reach_the_sliding_window_and_no_further(capacity: int, eviction: Eviction) -> None:
    """Whatever the capacity, a query of a sliding-window layer reads no token that has left its window."""
    spec = dataclasses.replace(SPEC, sliding_window=6)
    (plan,) = slot_plans(Budgets((capacity,), Policy(eviction=eviction)), (spec,), max_new_tokens=8)
    generator = torch.Generator().manual_seed(0)
    for base in (2, 5, 6, 7, 15):
        held = [[prefilled(base, plan, generator) for _ in range(HEADS)]]
        positions, seen = positions_of(held), torch.tensor([base])
        for step in range(8):
            now = [[reference_ordinals(head, base + step, base, plan) for head in held[0]]]
            check_extend_mask(plan, positions, seen + step, seen, now, sliding_window=6)


def test_equal_plans_are_equal_and_hash_alike() -> None:
    first, second = slot_plans(Budgets((16, 16)), (SPEC, SPEC))
    assert first == second
    assert hash(first) == hash(second)
