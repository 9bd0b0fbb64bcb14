"""Which tokens survive a prefill and where they are put, against the loops of the reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import oracles
import pytest
import torch
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from oracles import reference_ordinals, reference_slot
from runtime_inputs import assert_tokens, empty_buffers, named_tokens
from torch import Tensor

from xkv_fx.policy import EVICTIONS
from xkv_fx.runtime.selection import select_survivors, write_survivors
from xkv_fx.runtime.slots import EMPTY, SlotPlan

HEADS = 2
RING = SlotPlan(8, 8, 3, 0, "ring")
PLANS = {
    "ring": RING,
    "ring-of-one": SlotPlan(8, 8, 1, 0, "ring"),
    "all-ring": SlotPlan(6, 6, 6, 0, "ring"),
    "one-slot": SlotPlan(1, 1, 1, 0, "ring"),
    "sinks": SlotPlan(8, 8, 3, 2, "ring"),
    "sinks-and-recent-fill-it": SlotPlan(8, 8, 3, 5, "ring"),
    "sliding-window": SlotPlan(8, 8, 3, 0, "ring", sliding_window=11),
    "sinks-in-a-sliding-window": SlotPlan(8, 8, 2, 2, "ring", sliding_window=10),
    "append": SlotPlan(6, 14, 2, 1, "append"),
    "append-in-a-sliding-window": SlotPlan(6, 14, 2, 0, "append", sliding_window=7),
    "scored": SlotPlan(7, 7, 2, 1, "scored"),
}


@dataclasses.dataclass
class Layer:
    """One layer run twice: by what is tested, and by the reference."""

    plan: SlotPlan
    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        self.tested = empty_buffers(self.plan, self.rows, HEADS)
        self.expected = empty_buffers(self.plan, self.rows, HEADS)
        self.seen = torch.zeros(self.rows, dtype=torch.int64)
        self.base = torch.zeros(self.rows, dtype=torch.int64)
        self.generator = torch.Generator().manual_seed(self.seed)

    def prefill(self, lengths: list[int], new: int, fresh: bool = False) -> None:
        """Keep survivors of S = `new` tokens, of which each row has as many as `lengths` says."""
        length = torch.tensor(lengths)
        candidates = new if fresh else self.plan.slots + new
        shape = (self.rows, HEADS, candidates)
        scores = torch.randint(9, shape, generator=self.generator) / 8  # many of them equal
        k, v = named_tokens(torch.zeros_like(self.seen) if fresh else self.seen, new, HEADS)
        padding = (torch.arange(new) >= length[:, None])[:, None, :, None]
        k, v = k.masked_fill(padding, 9e6), v.masked_fill(padding, 9e6)
        gained = write_survivors(k, v, scores.clone(), length, self.seen, self.base, *self.tested, self.plan, fresh)
        plan = self.plan
        numbers = (plan.capacity, plan.recent, plan.sinks, EVICTIONS.index(plan.eviction), plan.sliding_window)
        expected = oracles.keep(k, v, scores, length, self.seen, self.base, *self.expected, *numbers, fresh)
        if fresh:
            self.seen, self.base = length.clone(), length.clone()
        else:
            self.seen = self.seen + length
            self.base = torch.where(length > 0, self.seen, self.base)
        self.compare(gained, expected, length)

    def decode(self, steps: int) -> None:
        """Take one slot after the other, as decode does, with the plan's slots here and the reference's there."""
        for _ in range(steps):
            k, v = named_tokens(self.seen, 1, HEADS)
            slots = self.plan.next_slot(self.seen, self.base).tolist()
            for row, held in enumerate(self.ordinals_by_loops()):
                for head in range(HEADS):
                    for buffers, slot in (
                        (self.tested, slots[row]),
                        (self.expected, reference_slot(held[head], self.plan)),
                    ):
                        buffers[0][row, head, slot], buffers[1][row, head, slot] = k[row, head, 0], v[row, head, 0]
            self.seen = self.seen + 1

    def ordinals(self) -> Tensor:
        return self.plan.ordinals(self.tested[2], self.seen, self.base)

    def ordinals_by_loops(self) -> list[list[list[int]]]:
        return [
            [reference_ordinals(held, seen, base, self.plan) for held in heads]
            for heads, seen, base in zip(self.expected[2].tolist(), self.seen.tolist(), self.base.tolist(), strict=True)
        ]

    def compare(self, gained: Tensor, expected: Tensor, length: Tensor) -> None:
        """Check both layers against each other, and the tested one against what must always hold."""
        ordinals, by_loops = self.ordinals(), torch.tensor(self.ordinals_by_loops())
        free_to_differ = self.is_out_of_window(ordinals) & self.is_out_of_window(by_loops)
        assert torch.equal(ordinals.masked_fill(free_to_differ, 0), by_loops.masked_fill(free_to_differ, 0))
        chosen = (length > 0)[:, None, None] & ~free_to_differ
        assert torch.equal(gained.masked_fill(~chosen, 0), expected.masked_fill(~chosen, 0))
        assert gained.dtype == torch.float32
        assert_tokens(self.tested[0], ordinals, 1.0)
        assert_tokens(self.tested[1], ordinals, -1.0)
        assert self.tested[0].isfinite().all()
        for row, total in enumerate(self.seen.tolist()):
            for head in range(HEADS):
                kept = [ordinal for ordinal in ordinals[row, head].tolist() if ordinal != EMPTY]
                assert len(set(kept)) == len(kept)
                assert all(ordinal < total for ordinal in kept)
                newest = range(max(0, total - self.plan.recent), total)
                assert set(newest) <= set(kept)
                assert set(range(min(self.plan.sinks, total))) <= set(kept)
                if length[row] > 0:
                    assert len(kept) == min(total, self.plan.capacity)

    def is_out_of_window(self, ordinals: Tensor) -> Tensor:
        """Tokens that no query will read again: the plan says nothing about which of them stay."""
        if self.plan.sliding_window is None:
            return torch.zeros_like(ordinals, dtype=torch.bool)
        gone = ordinals <= (self.seen - self.plan.sliding_window)[:, None, None]
        return gone & (ordinals >= self.plan.sinks)


each_plan = pytest.mark.parametrize("plan", list(PLANS.values()), ids=list(PLANS))


# Fresh prefill


@each_plan
@pytest.mark.parametrize(
    ("lengths", "new"),
    [([1], 1), ([3, 2], 3), ([8, 7, 1], 8), ([9, 8, 10], 10), ([40, 1, 13], 40), ([0, 5, 12], 12), ([2, 3], 30)],
    ids=str,
)
def test_fresh_prefill(plan: SlotPlan, lengths: list[int], new: int) -> None:
    Layer(plan, len(lengths)).prefill(lengths, new, fresh=True)


@each_plan
def test_fresh_prefill_forgets_what_was_there(plan: SlotPlan) -> None:
    layer = Layer(plan, 3)
    layer.prefill([20, 5, 9], 20, fresh=True)
    layer.decode(5 if plan.eviction != "scored" else 0)
    layer.prefill([4, 0, 11], 11, fresh=True)
    assert (layer.ordinals()[1] == EMPTY).all()


# Extending


@each_plan
@pytest.mark.parametrize("new", [1, 7, 30])
@pytest.mark.parametrize("first", [[1, 4], [8, 20], [6, 7]], ids=str)
def test_extend(plan: SlotPlan, new: int, first: list[int]) -> None:
    for steps in (0,) if plan.eviction == "scored" else (0, 8):
        layer = Layer(plan, 2)
        layer.prefill(first, max(first), fresh=True)
        layer.decode(steps)
        layer.prefill([new, (new + 1) // 2], new)
        layer.decode(steps)
        layer.prefill([1, new], new)


@pytest.mark.parametrize(
    "plan", [PLANS["ring"], PLANS["sinks"], PLANS["sliding-window"]], ids=["ring", "sinks", "window"]
)
def test_row_without_new_tokens_stays_as_it_is(plan: SlotPlan) -> None:
    layer = Layer(plan, 3)
    layer.prefill([20, 5, 9], 20, fresh=True)
    layer.decode(4)
    before = [buffer.clone() for buffer in layer.tested]
    layer.prefill([0, 3, 0], 3)
    layer.prefill([0, 3, 0], 5)
    for buffer, copy in zip(layer.tested, before, strict=True):
        assert torch.equal(buffer[0], copy[0])
        assert torch.equal(buffer[2], copy[2])
    layer.decode(9)
    layer.prefill([2, 1, 1], 2)


@pytest.mark.parametrize("name", ["append", "append-in-a-sliding-window"])
def test_row_without_new_tokens_keeps_what_it_appended(name: str) -> None:
    layer = Layer(PLANS[name], 2)
    layer.prefill([9, 4], 9, fresh=True)
    layer.decode(5)
    held = layer.ordinals()[0]
    layer.prefill([0, 3], 3)
    assert torch.equal(layer.ordinals()[0], held)
    layer.decode(3)
    layer.prefill([2, 0], 2)


def test_scores_of_a_row_without_new_tokens_stay_at_their_slots() -> None:
    """Under `"scored"` decode overwrites any slot, so that slots are in no order; scores belong to slots."""
    plan = SlotPlan(4, 4, 1, 0, "scored")
    buffers = empty_buffers(plan, 1, 1)
    buffers[2][0, 0] = torch.tensor([0, 9, 3, 8], dtype=torch.int32)
    k, v = named_tokens(torch.tensor([10]), 2, 1)
    scores, ten = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.9, 0.9]]]), torch.tensor([10])
    gained = write_survivors(k, v, scores, torch.tensor([0]), ten, ten, *buffers, plan, False)
    assert buffers[2].tolist() == [[[0, 9, 3, 8]]]
    torch.testing.assert_close(gained, scores[:, :, :4])


@given(data=st.data(), plan=st.sampled_from([plan for plan in PLANS.values() if plan.eviction != "scored"]))
@examples(40)
def test_any_conversation(data: st.DataObject, plan: SlotPlan) -> None:
    """A prompt, then turns of ragged length, some rows silent, with decode between them."""
    rows = data.draw(st.integers(1, 3))
    layer = Layer(plan, rows, seed=data.draw(st.integers(0, 99)))
    for turn in range(data.draw(st.integers(1, 4))):
        new = data.draw(st.integers(1, 24))
        shortest = 1 if turn == 0 else 0
        lengths = data.draw(st.lists(st.integers(shortest, new), min_size=rows, max_size=rows))
        layer.prefill(lengths, new, fresh=turn == 0)
        room = plan.slots - int(plan.count(layer.seen, layer.base).max()) if plan.eviction == "append" else 20
        layer.decode(data.draw(st.integers(0, room)))


# Survivors alone


def selected(
    scores: list[float], plan: SlotPlan, held: list[int], seen: int, length: int
) -> tuple[list[int], list[int]]:
    source, kept = select_survivors(
        torch.tensor([[scores]], dtype=torch.float32),
        torch.tensor([[held]]),
        torch.tensor([seen]),
        torch.tensor([length]),
        plan,
    )
    return source[0, 0].tolist(), kept[0, 0].tolist()


def test_survivors_written_down() -> None:
    plan = SlotPlan(4, 4, 2, 0, "ring")
    nothing = [EMPTY] * 4
    fresh: dict[str, Any] = {"plan": plan, "held": nothing, "seen": 0}
    assert selected([0.0] * 4 + [5, 1, 4, 0, 0, 0], length=6, **fresh) == ([4, 6, 8, 9], [0, 2, 4, 5])
    # the newest two of seven are tokens 5 and 6, whose places in the ring follow from their ordinals
    assert selected([0.0] * 4 + [1, 2, 3, 4, 5, 0, 0], length=7, **fresh) == ([7, 8, 10, 9], [3, 4, 6, 5])
    # padding is not kept, however it scores; slots stay free
    assert selected([0.0] * 4 + [1, 2, 9, 9, 9], length=2, **fresh)[1] == [0, 1, EMPTY, EMPTY]
    assert selected([0.0] * 4 + [5, 1, 9, 9, 9], length=3, **fresh)[1] == [0, 1, 2, EMPTY]


def test_old_slots_and_new_tokens_compete() -> None:
    plan = SlotPlan(4, 4, 1, 0, "scored")
    held = [2, 5, 7, 9]
    assert selected([9, 1, 8, 2, 7, 0, 0], plan, held, seen=10, length=3) == ([0, 2, 4, 6], [2, 7, 10, 12])
    assert selected([0, 0, 0, 1, 7, 8, 0], plan, held, seen=10, length=3) == ([3, 4, 5, 6], [9, 10, 11, 12])


def test_sinks_and_recent_outrank_any_score() -> None:
    plan = SlotPlan(4, 4, 1, 2, "scored")
    scores = [0.0] * 4 + [-1e20, -1e20, 1e20, 2e20, -1e20]
    assert selected(scores, plan, [EMPTY] * 4, seen=0, length=5)[1] == [0, 1, 3, 4]


def test_scores_may_be_negative_and_large() -> None:
    plan = SlotPlan(3, 3, 1, 0, "scored")
    scores = [0.0] * 3 + [-3e38, -1e38, -2e38, -3.2e38]
    assert selected(scores, plan, [EMPTY] * 3, seen=0, length=4)[1] == [1, 2, 3]
    assert selected([0.0] * 3 + [-5, -2, -3, 1e30], plan, [EMPTY] * 3, seen=0, length=3)[1] == [0, 1, 2]


def test_of_equal_scores_the_first_candidates_stay_whatever_the_width() -> None:
    plan = SlotPlan(6, 6, 1, 0, "scored")
    for padding in range(40):
        scores = [0.0] * 6 + [1.0] * 9 + [0.0] * padding
        assert selected(scores, plan, [EMPTY] * 6, seen=0, length=9)[1] == [0, 1, 2, 3, 4, 8]


def test_tokens_out_of_the_sliding_window_go_first() -> None:
    plan = SlotPlan(3, 3, 1, 0, "scored", sliding_window=4)
    scores = [0.0] * 3 + [9, 8, 7, 1, 2, 0, 0]
    # seven tokens seen: the next query, number 7, reads tokens from 4 on
    assert selected(scores, plan, [EMPTY] * 3, seen=0, length=7)[1] == [4, 5, 6]


def test_free_slots_hold_their_own_number() -> None:
    """Decode fills free slots in order without writing positions."""
    layer = Layer(SlotPlan(6, 10, 2, 0, "append"), 2)
    layer.prefill([4, 9], 9, fresh=True)
    assert layer.tested[2][0].tolist() == [list(range(10))] * HEADS
    assert layer.tested[2][1, :, 6:].tolist() == [list(range(6, 10))] * HEADS
