"""Which tokens survive a prefill, and where."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from oracles.slots import reference_ordinals
from xkv_fx.policy import EVICTIONS
from xkv_fx.runtime.slots import EMPTY, SlotPlan


class Token(NamedTuple):
    """A candidate for a slot of one row and KV head."""

    ordinal: int
    score: float
    key: Tensor
    value: Tensor


def keep(
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    length: Tensor,
    seen: Tensor,
    base: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    capacity: int,
    recent: int,
    sinks: int,
    eviction: int,
    sliding_window: int | None,
    fresh: bool,
) -> Tensor:
    """`xkv::keep`: of a layer's slots and the new tokens, `capacity` survive in each row and KV head.

    K/V of a free slot are left as they were; what they hold means nothing. Of tokens that left the sliding window,
    which nothing will read again, any may survive where room is left; here it is those of the best score.
    """
    slots = k_cache.shape[2]
    v_cache = v_cache if v_cache.shape[3] else k_cache
    plan = SlotPlan(capacity, slots, recent, sinks, EVICTIONS[eviction], sliding_window)  # type: ignore[arg-type]
    gained = torch.zeros(positions.shape, dtype=torch.float32)
    for row, head in itertools.product(range(k.shape[0]), range(k.shape[1])):
        before = 0 if fresh else int(seen[row])
        arrived = int(length[row])
        total = before + arrived
        score = ([0.0] * slots if fresh else []) + scores[row, head].tolist()
        held = [EMPTY] * slots
        if not fresh:
            held = reference_ordinals(positions[row, head].tolist(), before, int(base[row]), plan)
        old = {
            slot: Token(ordinal, score[slot], k_cache[row, head, slot].clone(), v_cache[row, head, slot].clone())
            for slot, ordinal in enumerate(held)
            if ordinal != EMPTY
        }
        new = [
            Token(before + index, score[slots + index], k[row, head, index], v[row, head, index])
            for index in range(arrived)
        ]
        if arrived == 0 and not fresh:
            for slot, token in old.items():
                gained[row, head, slot] = token.score
            continue
        survivors = _survivors([*old.values(), *new], total, plan)
        positions[row, head] = torch.arange(slots)
        for slot, token in _layout(survivors, total, plan).items():
            k_cache[row, head, slot] = token.key
            v_cache[row, head, slot] = token.value
            positions[row, head, slot] = token.ordinal
            gained[row, head, slot] = token.score
    return gained


def _survivors(candidates: list[Token], total: int, plan: SlotPlan) -> list[Token]:
    """At most `capacity` tokens, oldest first: the newest `recent`, the first `sinks`, the others by score."""
    forced = [token for token in candidates if token.ordinal >= total - plan.recent or token.ordinal < plan.sinks]
    others = [token for token in candidates if token.ordinal < total - plan.recent and token.ordinal >= plan.sinks]

    def rank(token: Token) -> tuple[bool, float]:
        out_of_window = plan.sliding_window is not None and token.ordinal <= total - plan.sliding_window
        return out_of_window, -token.score

    chosen = sorted(others, key=rank)[: plan.capacity - len(forced)]
    return sorted(forced + chosen, key=lambda token: token.ordinal)


def _layout(survivors: list[Token], total: int, plan: SlotPlan) -> dict[int, Token]:
    """The slot of each survivor; they come oldest first."""
    if plan.eviction != "ring" or total < plan.capacity:
        return dict(enumerate(survivors))
    placed = dict(enumerate(token for token in survivors if token.ordinal < total - plan.recent))
    for token in survivors:
        if token.ordinal >= total - plan.recent:
            placed[plan.capacity - plan.recent + (token.ordinal - plan.capacity) % plan.recent] = token
    return placed
