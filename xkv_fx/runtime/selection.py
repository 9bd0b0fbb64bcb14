"""Choosing which of the old slots and the new tokens survive a prefill, and laying the survivors out."""

from __future__ import annotations

import torch
from torch import Tensor

from xkv_fx.runtime.slots import EMPTY, SlotPlan

_LAST = torch.iinfo(torch.int64).max
_OUTSIDE = torch.finfo(torch.float32).min  # below every score, above a token that is not there


def select_survivors(
    scores: Tensor, ordinals: Tensor, seen: Tensor, length: Tensor, plan: SlotPlan
) -> tuple[Tensor, Tensor]:
    """Pick `plan.capacity` of the candidates, which are the slots of the cache followed by the S new tokens.

    Always kept are the newest `plan.recent` tokens and the first `plan.sinks`; the rest go by score, of equal ones the
    first candidates. When all tokens fit, all are kept.

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

    # Not `topk`, which takes any of equals: what a row keeps would depend on the lengths of those beside it.
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
    turned = start + torch.remainder(slot - start - (total - plan.capacity), plan.recent)
    return torch.where((slot >= start) & (total >= plan.capacity), turned, slot)


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
    """Replace what a layer keeps by the survivors of its slots and S new tokens, in place.

    Args:
        k, v: the new tokens, `[rows, kv_heads, S, key_dim or value_dim]`.
        scores: float32 `[rows, kv_heads, S]` when `fresh`, else `[rows, kv_heads, slots + S]`.
        k_cache, v_cache, positions: the layer's buffers; mutated.
        fresh: the cache counts as empty, whatever it holds. Otherwise a row with `length` 0 stays as it is.

    Returns:
        the scores of the survivors `[rows, kv_heads, slots]`, float32, 0 for a free slot.
    """
    slots = plan.slots
    if fresh:
        seen, base = torch.zeros_like(seen), torch.zeros_like(base)
        scores = torch.nn.functional.pad(scores, (slots, 0))
        ordinals = torch.full(positions.shape, EMPTY, dtype=torch.int64, device=k.device)
    else:
        ordinals = plan.ordinals(positions, seen, base)
    source, kept = select_survivors(scores, ordinals, seen, length, plan)
    untouched = None if fresh else (length == 0)[:, None, None]

    for cache, new in ((k_cache, k), (v_cache, v)):
        if not cache.shape[-1]:  # the values are the keys
            continue
        index = (source - slots).clamp_(min=0)[..., None].expand(-1, -1, -1, new.shape[-1])
        target = cache[:, :, : plan.capacity]
        if fresh:
            target.copy_(new.gather(2, index))
            continue
        held = cache.gather(2, source.clamp(max=slots - 1)[..., None].expand_as(index))
        survivors = torch.where((source < slots)[..., None], held, new.gather(2, index))
        target.copy_(torch.where(untouched[..., None], target, survivors))  # type: ignore[index]

    slot = torch.arange(slots, device=k.device)
    placed = torch.where(kept == EMPTY, slot[: plan.capacity], kept).to(positions.dtype)
    free = slot[plan.capacity :].to(positions.dtype).expand(*kept.shape[:2], -1)
    placed = torch.cat((placed, free), 2)
    positions.copy_(placed if untouched is None else torch.where(untouched, positions, placed))
    gained = scores.gather(2, source).masked_fill(kept == EMPTY, 0.0)
    gained = torch.nn.functional.pad(gained, (0, slots - plan.capacity))
    if untouched is None:
        return gained
    return torch.where(untouched, scores[:, :, :slots].masked_fill(ordinals == EMPTY, 0.0), gained)
