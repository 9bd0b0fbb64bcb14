"""Single ops as a graph calls them: what a policy decides, computed beside the op, comes from a `SlotPlan`.

Arguments are those of the ops' oracles, which hold the policy too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xkv_fx.policy import EVICTIONS
from xkv_fx.runtime.attention import distance_bias
from xkv_fx.runtime.selection import choose_survivors
from xkv_fx.runtime.slots import SlotPlan


def scored_choice(
    positions: Tensor, scores: Tensor, seen: Tensor, plan: SlotPlan, dtype: torch.dtype, slopes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The slot that a token takes under eviction by score, and the mask of its attention."""
    slot = plan.evicted_slot(positions, scores, seen)
    after = plan.with_token(positions, slot, seen)
    valid = plan.decode_mask(after, seen, seen)
    if slopes is None:
        return slot, torch.zeros(valid.shape, dtype=dtype).masked_fill(~valid, float("-inf"))
    bias = distance_bias(slopes, plan.decode_ages(after, seen, seen)[:, :, None])
    return slot, bias.masked_fill(~valid[:, :, None], float("-inf")).flatten(1, 2)


def scored_by(op: Callable[..., Tensor], device: str = "cpu") -> Callable[..., Tensor]:
    """`op`, one of the forms of `xkv::decode_scored`, called as its oracle is."""

    def step(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        positions: Tensor,
        scores: Tensor,
        seen: Tensor,
        scale: float,
        recent: int,
        sink_tokens: int,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        slots = positions.shape[2]
        plan = SlotPlan(slots, slots, recent, sink_tokens, "scored", sliding_window)
        given = [part.cpu() for part in (positions, scores, seen)]
        slot, mask = scored_choice(*given, plan, q.dtype, None if slopes is None else slopes.cpu())
        buffers = (k_cache, v_cache, positions, scores)
        return op(q, k, v, *buffers, slot.to(device), mask.to(device), seen, scale, softcap, sink_logits)

    return step


def keep_by(op: Callable[..., None]) -> Callable[..., Tensor]:
    """`op`, one of the forms of `xkv::keep`, called as its oracle is."""

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
        kind: Any = EVICTIONS[eviction]
        plan = SlotPlan(capacity, positions.shape[2], recent, sinks, kind, sliding_window)
        source, placed, gained = choose_survivors(scores, positions, length, seen, base, plan, fresh)
        op(k, v, source, placed, k_cache, v_cache, positions, capacity, fresh)
        return gained

    return keep
