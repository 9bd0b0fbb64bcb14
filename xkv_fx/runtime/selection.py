"""Choosing which of the old slots and the new tokens survive a prefill, and laying the survivors out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xkv_fx.runtime.graph_calls import named_call
from xkv_fx.runtime.slots import EMPTY, SlotPlan

_LAST = torch.iinfo(torch.int64).max
_OUTSIDE = torch.finfo(torch.float32).min  # below every score, above a token that is not there


def select_survivors(
    scores: Tensor, ordinals: Tensor, seen: Tensor, length: Tensor, plan: SlotPlan
) -> tuple[Tensor, Tensor]:
    """Pick `plan.capacity` of the candidates, which are the slots of the cache followed by the S new tokens.

    Always kept are the newest `plan.recent` tokens and the first `plan.sinks`; the rest are chosen by score,
    and among equal scores the first candidates win. When all tokens fit, all are kept.

    Args:
        scores: float32 `[rows, kv_heads, slots + S]`; one that is not a number ranks last.
        ordinals: int64 `[rows, kv_heads, slots]`, what the slots hold now (`EMPTY` for nothing).
        seen: int64 `[rows]`, tokens seen before these.
        length: int64 `[rows]`, valid ones among the S new tokens; they come first.

    Returns:
        the source `[rows, kv_heads, capacity]`, an index into the candidates for each slot, and the ordinals
        `[rows, kv_heads, capacity]` that the slots hold afterwards (`EMPTY` for nothing).
    """
    new = torch.arange(scores.shape[2] - ordinals.shape[2], device=scores.device)
    arrived = torch.where(new < length[:, None], seen[:, None] + new, EMPTY)
    candidates = torch.cat((ordinals, arrived[:, None].expand(-1, ordinals.shape[1], -1)), 2)
    total = (seen + length)[:, None, None]

    priority = torch.nan_to_num(scores, nan=_OUTSIDE, posinf=torch.finfo(torch.float32).max, neginf=_OUTSIDE)
    if plan.sliding_window is not None:
        priority = priority.masked_fill(candidates <= total - plan.sliding_window, _OUTSIDE)
    always = (candidates >= total - plan.recent) | (candidates < plan.sinks)
    priority = priority.masked_fill(always, float("inf")).masked_fill(candidates == EMPTY, float("-inf"))

    # Not `topk`, which breaks ties arbitrarily: what a row keeps would depend on the lengths of the rows beside it.
    source = torch.sort(priority, dim=2, descending=True, stable=True).indices[:, :, : plan.capacity]
    kept = candidates.gather(2, source)
    order = torch.argsort(torch.where(kept == EMPTY, _LAST, kept), dim=2)
    order = order.gather(2, _turn_ring(total, plan).expand_as(order))
    return source.gather(2, order), kept.gather(2, order)


def _turn_ring(total: Tensor, plan: SlotPlan) -> Tensor:
    """For each slot the rank, oldest survivor first, of the token that it holds: `[rows, 1, capacity]`."""
    slot = torch.arange(plan.capacity, device=total.device).expand(total.shape[0], 1, -1)
    if plan.eviction != "ring":
        return slot
    start = plan.capacity - plan.recent
    wrapped = start + torch.remainder(slot - start - (total - plan.capacity), plan.recent)
    return torch.where((slot >= start) & (total >= plan.capacity), wrapped, slot)


def choose_survivors(
    scores: Tensor, positions: Tensor, length: Tensor, seen: Tensor, base: Tensor, plan: SlotPlan, fresh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Which of a layer's slots and S new tokens stay, and where. A row without new tokens stays as it is, unless
    `fresh`.

    Args:
        scores: float32 `[rows, kv_heads, S]` when `fresh`, else `[rows, kv_heads, slots + S]`.
        positions: int32 `[rows, kv_heads, slots]`, the layer's buffer.
        length: int64 `[rows]`, valid ones among the S new tokens; they come first.
        seen, base: int64 `[rows]`, tokens seen before these, and by the last prefill.
        fresh: the cache counts as empty, whatever it holds.

    Returns:
        what `move_survivors` takes: `source` and `placed`; and the scores of the survivors, float32
        `[rows, kv_heads, slots]`, 0 for a free slot.
    """
    slots, room = plan.slots, plan.slots - plan.capacity
    if fresh:
        seen = torch.zeros_like(seen)
        scores = torch.nn.functional.pad(scores, (slots, 0))
        ordinals = torch.full(positions.shape, EMPTY, dtype=torch.int64, device=scores.device)
    else:
        ordinals = plan.ordinals(positions, seen, base)
    source, kept = select_survivors(scores, ordinals, seen, length, plan)
    slot = torch.arange(slots, device=scores.device)
    placed = torch.where(kept == EMPTY, slot[: plan.capacity], kept)
    placed = torch.cat((placed, slot[plan.capacity :].expand(*kept.shape[:2], -1)), 2).to(positions.dtype)
    gained = torch.nn.functional.pad(scores.gather(2, source).masked_fill(kept == EMPTY, 0.0), (0, room))
    if fresh:
        return source, placed, gained
    untouched = (length == 0)[:, None, None]
    held = scores[:, :, :slots].masked_fill(ordinals == EMPTY, 0.0)
    return (
        torch.where(untouched, slot[: plan.capacity], source),
        torch.where(untouched, positions, placed),
        torch.where(untouched, held, gained),
    )


def choosing_call(plan: SlotPlan, fresh: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`choose_survivors` of one plan, as a function that a graph can call and print."""

    def choose(
        scores: Tensor, positions: Tensor, length: Tensor, seen: Tensor, base: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return choose_survivors(scores, positions, length, seen, base, plan, fresh)

    def fake(scores: Tensor, positions: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Says shapes alone; none of these depends on how many tokens there are."""
        source = positions.new_empty((*positions.shape[:2], plan.capacity), dtype=torch.int64)
        return source, torch.empty_like(positions), torch.empty_like(positions, dtype=torch.float32)

    return named_call(choose, fake, f"choose_survivors_{plan.capacity}_recent_{plan.recent}", __name__)


def move_survivors(
    k: Tensor,
    v: Tensor,
    source: Tensor,
    placed: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    capacity: int,
    fresh: bool,
) -> None:
    """Bring survivors to their slots, in place; see `xkv::keep`, whose arguments these are."""
    for cache, new in ((k_cache, k), (v_cache, v)):
        if cache.shape[-1]:  # else the values are the keys
            move_vectors(new, source, cache, capacity, fresh)
    positions.copy_(placed)


def move_vectors(new: Tensor, source: Tensor, cache: Tensor, capacity: int, fresh: bool) -> None:
    """As `move_survivors`, of one buffer `[rows, kv_heads, slots, dim]`, and of the new tokens' vectors."""
    slots = cache.shape[2]
    index = (source - slots).clamp_(min=0)[..., None].expand(-1, -1, -1, new.shape[-1])
    moved = new.gather(2, index)
    if not fresh:
        held = cache.gather(2, source.clamp(max=slots - 1)[..., None].expand_as(index))
        moved = torch.where((source < slots)[..., None], held, moved)
    cache[:, :, :capacity].copy_(moved)


def write_survivors(
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    length: Tensor,
    seen: Tensor,
    base: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    plan: SlotPlan,
    fresh: bool,
) -> Tensor:
    """Replace what a layer keeps by the survivors of its slots and S new tokens, in place: `choose_survivors`, then
    `move_survivors`.

    Args:
        k, v: the new tokens, `[rows, kv_heads, S, key_dim or value_dim]`.
        k_cache, v_cache, positions: the layer's buffers; mutated.

    Returns:
        the scores of the survivors `[rows, kv_heads, slots]`, float32, 0 for a free slot.
    """
    source, placed, gained = choose_survivors(scores, positions, length, seen, base, plan, fresh)
    move_survivors(k, v, source, placed, k_cache, v_cache, positions, plan.capacity, fresh)
    return gained
