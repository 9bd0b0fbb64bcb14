"""What is known about a model: read once for each public call, and handed on from there."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which part of a model's heads and weights a graph has, where processes share a model; the whole otherwise.

    Attributes:
        rank, size: part `rank` of `size`, counted from 0.
    """

    rank: int = 0
    size: int = 1

    def all_heads(self, states: Tensor) -> Tensor:
        """Gather the heads of all parts, in order, into `[rows, heads, ...]`, given the heads of this part."""
        return states


UNSHARDED = Shard()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts about one model, whoever it is captured for.

    Attributes:
        name: the name of its class, for errors.
        fingerprint: identifies the model in plans and profiles.
        dtype, device: of keys and values.
        max_positions: the longest sequence that the model is taken for; None if unbounded.
        ends_early: what changes beyond `max_positions`, where the model has positions for more than that.
        has_latents: whether keys and values are made from latents, which may be cached in their place.
        shard: which part of the model this process has.
    """

    name: str
    fingerprint: str
    dtype: torch.dtype
    device: torch.device
    max_positions: int | None
    ends_early: str = ""
    has_latents: bool = False
    shard: Shard = UNSHARDED
