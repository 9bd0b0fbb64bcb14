"""What to say of a limit in bytes that is far more than a plan can use."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from xkv_fx.budgets import Plan
from xkv_fx.heads import planned_slot_bytes
from xkv_fx.layers import HasItemSize, Layers, layers_of
from xkv_fx.sizes import as_text

_FAR_ABOVE = 2
"""How many times the context a limit must serve to be far above what the context can use."""


def unused_limit(plan: Plan, layers: Layers, dtype: HasItemSize | None) -> str | None:
    """A warning that the limit of a plan pays for prompts that are far longer than those it was solved for; None where
    it does not, or where the plan has no limit in bytes.

    Args:
        layers: those that the plan was solved for.
        dtype: that the limit is in; the layers' own when None.
    """
    made = plan.provenance
    constraint = made.constraint or {}
    if made.context is None or "kv_bytes" not in constraint:
        return None
    specs = layers_of(layers)
    limit, rows = int(constraint["kv_bytes"]), int(constraint.get("batch_size", 1))
    room = int(constraint.get("max_new_tokens", 0))
    stored = zip(specs, plan.layer_formats, strict=True)
    price = [planned_slot_bytes(spec, formats, dtype) * rows for spec, formats in stored]

    def taken(context: int) -> int:
        return sum(spec.effective_capacity(context + room) * each for spec, each in zip(specs, price, strict=True))

    windows = [spec.sliding_window or limit for spec in specs]  # no layer holds more tokens than there are bytes
    served = bisect_right(range(1, int(np.max(windows)) + 1), limit, key=taken)
    if served < _FAR_ABOVE * made.context:
        return None
    return (
        f"kv_bytes of {as_text(limit)} is far more than the {as_text(taken(made.context))} that prompts of "
        f"{made.context:,} tokens can use, yet longer prompts would lose tokens. Give solve the tokens to plan for: "
        f"the limit serves up to context={served}, as far as the model has positions; with context={made.context} "
        "this plan is right"
    )
