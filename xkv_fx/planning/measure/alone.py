"""What is measured alone while all else holds everything: a layer, or one KV head of a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xkv_fx.budgets import Plan
from xkv_fx.layers import LayerSpec
from xkv_fx.planning.measure.continuation import FULL, HeadPlans, LayerPlan, LayerPlans
from xkv_fx.planning.measure.held import Storing
from xkv_fx.policy import Policy
from xkv_fx.runtime.slots import slot_plans


@dataclasses.dataclass(frozen=True)
class Alone:
    """A layer, by its index, and which of its KV heads; None for all of them."""

    layer: int
    head: int | None = None

    def plans(
        self,
        layers: Sequence[LayerSpec],
        share: float,
        storing: Storing | None,
        policy: Policy,
        tokens: int,
        continuation: int,
    ) -> LayerPlans:
        """The plan under which this holds a share of the `tokens` of a prompt, stored so, and all else everything."""
        spec = layers[self.layer]
        slots = None
        if share < 1:
            capacity = max(1, round(share * spec.effective_capacity(tokens)))
            (slots,) = slot_plans(Plan((capacity,), policy), (spec,), continuation)
        cut: LayerPlan = (slots, storing)
        plans: list[LayerPlan | HeadPlans] = [FULL] * len(layers)
        plans[self.layer] = cut
        if self.head is not None and spec.kv_heads > 1:
            plans[self.layer] = HeadPlans(tuple(cut if head == self.head else FULL for head in range(spec.kv_heads)))
        return plans


def all_alone(layers: Sequence[LayerSpec], by: str) -> tuple[Alone, ...]:
    """Each layer, or each KV head of each layer, in order."""
    if by == "layer":
        return tuple(Alone(layer) for layer in range(len(layers)))
    return tuple(Alone(layer, head) for layer, spec in enumerate(layers) for head in range(spec.kv_heads))
