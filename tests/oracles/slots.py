"""Which slot a decoded token takes, and what the slots hold, token after token."""

from __future__ import annotations

from collections.abc import Sequence

from xkv_fx.errors import BudgetError, CapacityError
from xkv_fx.runtime.slots import EMPTY, SlotPlan


def reference_slot(held: Sequence[int], plan: SlotPlan) -> int:
    """The slot that the next decoded token takes, when slot s holds the token with ordinal `held[s]`.

    Raises:
        CapacityError: every slot is taken, the plan may not evict, and no token has left the sliding window.
        BudgetError: the plan evicts by score, which cannot be told from the ordinals.
    """
    if EMPTY in held:
        return held.index(EMPTY)
    if plan.eviction == "ring":
        oldest_of_recent = sorted(held)[-plan.recent]
        return held.index(oldest_of_recent)
    if plan.eviction == "scored":
        raise BudgetError("eviction='scored' chooses by accumulated scores; this reference knows ordinals only")
    if plan.eviction == "append" and plan.sliding_window is not None:
        oldest = min(held)
        if oldest <= max(held) + 1 - plan.sliding_window:
            return held.index(oldest)
    raise CapacityError(f"all {len(held)} slots are taken and eviction={plan.eviction!r} never overwrites one")


def reference_ordinals(positions: Sequence[int], seen: int, base: int, plan: SlotPlan) -> list[int]:
    """What each slot of one row and KV head holds, `EMPTY` for nothing, by decoding token after token again.

    Args:
        positions: what the last prefill wrote, and for `"scored"` decode too; one ordinal for each of `plan.slots`.
        seen: valid tokens that the row has seen.
        base: how many of them it had seen by the end of the last prefill.
    """
    if plan.eviction == "scored":
        return [ordinal if slot < seen else EMPTY for slot, ordinal in enumerate(positions)]
    prefilled = min(base, plan.capacity)
    held = [positions[slot] if slot < prefilled else EMPTY for slot in range(plan.slots)]
    for token in range(base, seen):
        held[reference_slot(held, plan)] = token
    return held
