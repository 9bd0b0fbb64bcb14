"""A captured model: the two graphs that every pipeline starts from, and what is known about the model."""

from __future__ import annotations

import copy
import dataclasses
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.errors import PassError
from xkv_fx.layers import LayerSpec
from xkv_fx.policy import Policy
from xkv_fx.runtime.scorers import Scorer, check_independent_heads, scorer_of


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which part of a model's heads and weights a graph has, where processes share a model; the whole otherwise.

    Attributes:
        rank, size: part `rank` of `size`, counted from 0.
    """

    rank: int = 0
    size: int = 1

    def all_heads(self, states: Tensor) -> Tensor:
        """`[rows, heads, ...]` of all parts' heads, in their order, from those of this part."""
        return states


UNSHARDED = Shard()


@dataclasses.dataclass(frozen=True)
class CapturedModel:
    """One attention node a layer, K/V not repeated, no mask arithmetic; weights shared with the user's model.

    Attributes:
        prompt: graph of `(input_ids, position_ids)` `[rows, S]` -> logits `[rows, S, vocabulary]`, S dynamic.
        token: the same for S = 1, all shapes static; None if it was not asked for.
        layers: what each attention caches, in execution order.
        fingerprint: identifies the model in plans and profiles.
        rows: batch rows that the graphs are captured for.
        dtype, device: of keys and values.
        max_positions: the longest sequence that the model has positions for; None if unbounded.
        vocabulary: size of the logits' last dimension.
        ends_early: what is different behind `max_positions`, where that is less than the model has positions for.
        shard: which part of the model this process has; `layers` are that part's.
    """

    prompt: GraphModule
    token: GraphModule | None
    layers: tuple[LayerSpec, ...]
    fingerprint: str
    rows: int
    dtype: torch.dtype
    device: torch.device
    max_positions: int | None
    vocabulary: int
    ends_early: str = ""
    shard: Shard = UNSHARDED

    def scorer_of(self, policy: Policy) -> Scorer:
        """The scorer that a policy names, for this model.

        Raises:
            BudgetError: as `runtime.scorers.scorer_of`; or it would choose other tokens for a part of the model.
        """
        scorer = scorer_of(policy)
        if self.shard.size > 1:
            check_independent_heads(policy.scorer, scorer)
        return scorer

    def graph(self, kind: Literal["prompt", "token"]) -> GraphModule:
        """A copy of a graph for passes to change; its weights are the very same tensors."""
        module = self.prompt if kind == "prompt" else self.token
        if module is None:
            raise PassError("the model was captured without the graph of one token; capture it again with it")
        return GraphModule(module, copy.deepcopy(module.graph))
