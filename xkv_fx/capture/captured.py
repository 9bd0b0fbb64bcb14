"""A captured model: the two graphs that every pipeline starts from, and what is known about the model."""

from __future__ import annotations

import copy
import dataclasses
from typing import Literal

import torch
from torch.fx import GraphModule

from xkv_fx.capture.facts import ModelFacts, Shard
from xkv_fx.capture.shared_weights import SharedWeights
from xkv_fx.errors import PassError
from xkv_fx.layers import LayerSpec
from xkv_fx.policy import Policy
from xkv_fx.runtime.recurrence import Recurrence
from xkv_fx.runtime.scorers import Scorer, check_independent_heads, scorer_of


@dataclasses.dataclass(frozen=True)
class CapturedModel:
    """One attention node a layer, K/V not repeated, no mask arithmetic; weights shared with the user's model.

    Attributes:
        prompt: graph of `(input_ids, position_ids)` `[rows, S]` -> logits `[rows, S, vocabulary]`, S dynamic.
        token: the same for S = 1, all shapes static; None if it was not asked for.
        layers: what each attention caches, in execution order, for the part of the model that this process has.
        rows: batch rows that the graphs are captured for.
        vocabulary: size of the logits' last dimension, which can only be read off the graph.
        facts: what is known about the model.
        weights: a record of the weights shared with the model, as captured; None where each call passes its own.
        recurrences: the layers that mix tokens by a state of fixed size, in execution order; each a node of the graphs.
    """

    prompt: GraphModule
    token: GraphModule | None
    layers: tuple[LayerSpec, ...]
    rows: int
    vocabulary: int
    facts: ModelFacts
    weights: SharedWeights | None = None
    recurrences: tuple[Recurrence, ...] = ()

    @property
    def fingerprint(self) -> str:
        return self.facts.fingerprint

    @property
    def dtype(self) -> torch.dtype:
        return self.facts.dtype

    @property
    def device(self) -> torch.device:
        return self.facts.device

    @property
    def max_positions(self) -> int | None:
        return self.facts.max_positions

    @property
    def ends_early(self) -> str:
        return self.facts.ends_early

    @property
    def shard(self) -> Shard:
        return self.facts.shard

    def scorer_of(self, policy: Policy) -> Scorer:
        """The scorer that a policy names, for this model.

        Raises:
            BudgetError: as `runtime.scorers.scorer_of`; or it would choose other tokens for a part of the model.
        """
        scorer = scorer_of(policy)
        if self.shard.size > 1:
            check_independent_heads(policy.scorer, scorer)
        return scorer

    def check_weights(self) -> None:
        """Raise ModelMismatchError if the weights are no longer those that were captured."""
        if self.weights is not None:
            self.weights.check()

    def graph(self, kind: Literal["prompt", "token"]) -> GraphModule:
        """A copy of a graph for passes to change; its weights are the very same tensors."""
        module = self.prompt if kind == "prompt" else self.token
        if module is None:
            raise PassError("the model was captured without the graph of one token; capture it again with it")
        return GraphModule(module, copy.deepcopy(module.graph))
