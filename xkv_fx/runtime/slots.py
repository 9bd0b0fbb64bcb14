"""Which slot of a layer holds which token: pure functions of per-row counters, so they cost nothing to share.

Every kept token has an *ordinal*: its place among the valid tokens that its row has seen, from 0. Under the eviction
`"ring"` the last `recent` slots are a ring that holds the newest tokens, and the slots before it hold what prefill
kept. With C slots, a ring of r, and t the ordinal of a token, the slot of a token that arrives in decode is

    t                              while t < C (free slots are filled first)
    C - r + (t - C) mod r          afterwards

so slot and validity follow from the count of tokens seen alone, and prefill lays its survivors out to agree.

Under `"append"` with b tokens seen by the last prefill, of which m = min(b, C) survived oldest first, the slots are
taken in order: m + t - b. Where there are as many slots as the layer's sliding window is long, that goes on from the
first slot again: the oldest of W distinct tokens before t is not among the W - 1 newest, so it has left the window.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xkv_fx.budgets import Plan
from xkv_fx.heads import HeadGroup
from xkv_fx.layers import LayerSpec
from xkv_fx.policy import Eviction, Policy

EMPTY = -1


@dataclasses.dataclass(frozen=True)
class SlotPlan:
    """How one cache uses its slots; caches with equal plans share slot and mask in the decode graph.

    Attributes:
        capacity: slots that prefill fills at most.
        slots: slots allocated; more than `capacity` only where generated tokens are appended, and then no more than the
            sliding window.
        recent: newest tokens that are always kept; the size of the ring.
        sinks: first tokens that are always kept, as long as the sliding window reaches them.
        eviction: what happens when every slot is taken.
        sliding_window: the layer's sliding window, None for a layer that attends to all tokens.
    """

    capacity: int
    slots: int
    recent: int
    sinks: int
    eviction: Eviction
    sliding_window: int | None = None

    @property
    def masks_by_position(self) -> bool:
        """Whether decode must mask slots by what they hold. A ring as large as the sliding window never holds a token
        that has left it."""
        return self.sliding_window is not None and self.recent < self.sliding_window

    @property
    def takes_turns(self) -> bool:
        """Whether appended tokens overwrite the oldest once all slots are taken; those have left the sliding window."""
        return self.eviction == "append" and self.slots == self.sliding_window

    def count(self, seen: Tensor, base: Tensor) -> Tensor:
        """Slots in use `[rows]`, after `seen` tokens `[rows]` of which `base` had been seen by the last prefill."""
        if self.eviction == "append":
            return torch.clamp(self._written(seen, base), max=self.slots)
        return torch.clamp(seen, max=self.slots)

    def next_slot(self, seen: Tensor, base: Tensor) -> Tensor:
        """The slot `[rows]` that the next decoded token takes. Not for `"scored"`, which looks at the scores."""
        if self.eviction == "append":
            return self._written(seen, base) % self.slots
        if self.eviction == "none":
            return self.count(seen, base)
        ring = self.capacity - self.recent + (seen - self.capacity) % self.recent
        return torch.where(seen < self.capacity, seen, ring)

    def _written(self, seen: Tensor, base: Tensor) -> Tensor:
        """Under `"append"`, how often a slot has been written: survivors of the last prefill, and tokens since."""
        return torch.clamp(base, max=self.capacity) + (seen - base)

    def evicted_slot(self, positions: Tensor, scores: Tensor, seen: Tensor) -> Tensor:
        """Under `"scored"`, the slot `[rows, kv_heads]` that the next decoded token takes.

        A free one while there is one; then one that has left the sliding window, else the one of the lowest score that
        is neither among the newest `recent` tokens, the new one counted, nor a sink.

        Args:
            positions: int32 `[rows, kv_heads, slots]`.
            scores: accumulated attention, float32 `[rows, kv_heads, slots]`.
            seen: int64 `[rows]`, tokens seen before the new one.
        """
        seen = seen[:, None, None]
        ordinals = positions.long()
        protected = (ordinals > seen - self.recent) | (ordinals < self.sinks)
        rank = scores.masked_fill(protected, float("inf"))
        if self.sliding_window is not None:
            rank = rank.masked_fill(ordinals <= seen - self.sliding_window, float("-inf"))
        return torch.where(seen[:, :, 0] < self.capacity, seen[:, :, 0], rank.argmin(2))

    def with_token(self, positions: Tensor, slot: Tensor, seen: Tensor) -> Tensor:
        """Under `"scored"`, `positions` as they will be once the next token has taken `slot` `[rows, kv_heads]`."""
        place = torch.arange(self.slots, device=positions.device)
        return torch.where(place == slot[..., None], seen[:, None, None].to(positions.dtype), positions)

    def ordinals(self, positions: Tensor, seen: Tensor, base: Tensor) -> Tensor:
        """The ordinal that each slot holds, `[rows, kv_heads, slots]`, `EMPTY` for a free slot.

        Args:
            positions: int32 `[rows, kv_heads, slots]`, as written by the last prefill, and for `"scored"` by decode.
        """
        slot = torch.arange(self.slots, device=positions.device)
        seen, base = seen[:, None], base[:, None]
        if self.eviction == "ring":
            start = self.capacity - self.recent
            newest = seen - 1 - torch.remainder(seen - 1 - self.capacity - (slot - start), self.recent)
            wrapped = (seen >= self.capacity) & (slot >= start)
            live = torch.where(wrapped[:, None], newest[:, None], positions.long())
        elif self.eviction == "append":
            last = self._written(seen, base) - 1
            write = last - torch.remainder(last - slot, self.slots)  # the number of the slot's latest write
            appended = write - torch.clamp(base, max=self.capacity)
            live = torch.where((appended >= 0)[:, None], (base + appended)[:, None], positions.long())
        else:
            live = positions.long()
        used = slot < self.count(seen[:, 0], base[:, 0])[:, None]
        return torch.where(used[:, None], live, EMPTY)

    def decode_mask(self, positions: Tensor, seen: Tensor, base: Tensor) -> Tensor:
        """Slots that the next token attends to once it has taken its own: bool `[rows, kv_heads or 1, 1, slots]`.

        Args:
            positions: under `"scored"`, as `with_token` gives them.
        """
        if self.sliding_window is None or not self.masks_by_position:
            slot = torch.arange(self.slots, device=seen.device)
            return (slot < self.count(seen + 1, base)[:, None])[:, None, None]
        ordinals = self.ordinals(positions, seen + 1, base)
        inside = ordinals > (seen - self.sliding_window)[:, None, None]
        return ((ordinals != EMPTY) & inside)[:, :, None]

    def decode_ages(self, positions: Tensor, seen: Tensor, base: Tensor) -> Tensor:
        """How far the next token is from the token in each slot, 0 for itself: int64 `[rows, kv_heads, slots]`, for
        valid slots; the arguments are those of `decode_mask`."""
        return seen[:, None, None] - self.ordinals(positions, seen + 1, base)

    def extend_ages(self, positions: Tensor, seen: Tensor, base: Tensor) -> Tensor:
        """How far the first next token is from each slot's: int64 `[rows, kv_heads, slots]`, for valid slots."""
        return seen[:, None, None] - self.ordinals(positions, seen, base)

    def extend_mask(self, positions: Tensor, seen: Tensor, base: Tensor, length: int) -> Tensor:
        """Slots that each of the next `length` tokens attends to: bool `[rows, kv_heads or 1, length or 1, slots]`."""
        if self.sliding_window is None:
            slot = torch.arange(self.slots, device=seen.device)
            return (slot < self.count(seen, base)[:, None])[:, None, None]
        ordinals = self.ordinals(positions, seen, base)[:, :, None]
        query = seen[:, None] + torch.arange(length, device=seen.device)
        return (ordinals != EMPTY) & (ordinals > (query - self.sliding_window)[:, None, :, None])


def slot_plans(budgets: Plan, layers: tuple[LayerSpec, ...], max_new_tokens: int = 0) -> tuple[SlotPlan, ...]:
    """One plan for each of `budgets.groups(layers)`: a layer, or KV heads of one that are planned alike.

    A layer that holds its whole sliding window is a ring of that size: nothing needed is lost.

    Raises:
        BudgetError: the plan does not fit the layers, or `max_new_tokens` is not a whole number of at least 0.
    """
    room = budgets.room_for(max_new_tokens)
    return tuple(_slot_plan(group, layers[group.layer], budgets.policy, room) for group in budgets.groups(layers))


def _slot_plan(group: HeadGroup, spec: LayerSpec, policy: Policy, room: int) -> SlotPlan:
    capacity, window = group.capacity, spec.sliding_window
    slots = spec.effective_capacity(capacity + room)
    if window is not None and capacity == window:
        return SlotPlan(capacity, slots, capacity, 0, "ring", window)
    recent, sinks = policy.recent_for(capacity), policy.sinks_for(capacity)
    return SlotPlan(capacity, slots, recent, sinks, policy.eviction, window)
