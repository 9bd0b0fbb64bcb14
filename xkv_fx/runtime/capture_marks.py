"""Marks that attention over picked keys leaves in a graph while a model is exported; the pass `MatchIndexers` reads and
removes them. They run, where a copy of the model is only looked at."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("xkv::causal_pairs", mutates_args=())
def causal_pairs(rows: int, length: int, device: torch.device) -> Tensor:
    """The causal mask of S tokens: bool `[rows, 1, S, S]`, True where a query sees a key."""
    return torch.ones(rows, 1, length, length, dtype=torch.bool, device=device).tril()


@causal_pairs.register_fake
def _(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.empty(rows, 1, length, length, dtype=torch.bool, device=device)


@torch.library.custom_op("xkv::masked_queries", mutates_args=())
def masked_queries(q: Tensor, mask: Tensor, picked: Tensor | None = None) -> Tensor:
    """The queries of an attention that is given a mask.

    Args:
        q: `[rows, query_heads, S, key_dim]`.
        mask: bool `[rows, 1, S, S]`.
        picked: the places of the keys that each query reaches, `[rows, S, any]`; None for all that the mask shows.
    """
    return q.clone()


@masked_queries.register_fake
def _(q: Tensor, mask: Tensor, picked: Tensor | None = None) -> Tensor:
    return torch.empty_like(q)
