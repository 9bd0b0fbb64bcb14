"""Which keys an indexer lets a query reach (DeepSeek sparse attention: DeepSeek-V3.2, arXiv 2512.02556, section 2.1).

Its own queries and keys are fewer and smaller than those of the attention, and its scores need no values. They are
float32, as in the models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xkv_fx.runtime.form import Index

INDEX_BLOCK = 64
"""Queries handled at once; an indexer has a score for each of its many heads, which it sums up."""


def index_scores(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """How much each query wants each key: `sum_h weights[h] * relu(queries[h] . keys)`.

    Args:
        queries: `[rows, index_heads, S, index_dim]`.
        keys: `[rows, kv_heads or 1, N, index_dim]`.
        weights: float32 `[rows, S, index_heads]`.

    Returns:
        float32 `[rows, kv_heads or 1, S, N]`.
    """
    products = torch.matmul(queries.float()[:, None], keys.float().transpose(-1, -2)[:, :, None]).relu()
    return torch.matmul(weights[:, None, :, None].float(), products.transpose(2, 3)).squeeze(3)


def highest(scores: Tensor, reachable: Tensor, top_k: int) -> Tensor:
    """The `top_k` reachable keys of the highest scores, and those that tie with the last of them: which of these were
    left out would depend on where the keys lie.

    Args:
        scores: float32 `[rows, kv_heads or 1, S, N]`.
        reachable: bool, broadcastable to that.

    Returns:
        bool `[rows, kv_heads or 1, S, N]`.
    """
    scores = scores.masked_fill(~reachable, float("-inf"))
    return reachable & (scores >= last_picked(scores, top_k))


def last_picked(scores: Tensor, top_k: int) -> Tensor:
    """The lowest of the `top_k` highest scores, minus infinity where there are fewer: `[..., 1]`."""
    count = scores.shape[-1]
    if isinstance(count, int):
        top_k = min(top_k, count)
    else:  # a symbol, which must not be compared with a number
        none = torch.full((*scores.shape[:-1], top_k), float("-inf"), device=scores.device)
        scores = torch.cat((scores, none), -1)
    return scores.topk(top_k, -1).values[..., -1:]


def reached_by_index(index: Index, queries: slice, keys: slice, reachable: Tensor) -> Tensor:
    """Which of some keys some queries reach: bool `[rows, 1, queries, keys]`.

    Args:
        reachable: bool, broadcastable to that.
    """
    scores = index_scores(index.queries[:, :, queries], index.keys[:, :, keys], index.weights[:, queries])
    return highest(scores, reachable, index.top_k)
