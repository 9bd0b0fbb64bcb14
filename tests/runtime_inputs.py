"""Inputs that several tests of the runtime room share."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from xkv_fx.runtime.scorers import Scorer
from xkv_fx.runtime.slots import SlotPlan

HEADS = [(1, 1), (4, 4), (4, 2), (6, 1)]
"""Query heads and KV heads: one, no grouping, GQA, MQA."""


def random_qkv(
    heads: tuple[int, int],
    length: int,
    dims: tuple[int, int] = (8, 8),
    rows: int = 2,
    dtype: torch.dtype = torch.float32,
    keys: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and `keys` (or as many) keys and values, from the global generator."""
    keys = length if keys is None else keys
    return (
        torch.randn(rows, heads[0], length, dims[0]).to(dtype),
        torch.randn(rows, heads[1], keys, dims[0]).to(dtype),
        torch.randn(rows, heads[1], keys, dims[1]).to(dtype),
    )


def before_rotation(scorer: Scorer, q: Tensor) -> dict[str, Tensor]:
    """What a scorer that needs it is given about queries before rotation: they are not rotated at all."""
    if not getattr(scorer, "needs_unrotated_queries", False):
        return {}
    return {"unrotated": q, "rotation": torch.eye(q.shape[3]).expand(q.shape[0], -1, -1)}


def named_tokens(
    start: Tensor, length: int, kv_heads: int, key_dim: int = 2, value_dim: int = 3
) -> tuple[Tensor, Tensor]:
    """K/V that say which token they are: element (row, head, i, d) is a number of row, head, ordinal and d alone.

    Args:
        start: int64 `[rows]`, the ordinal of each row's first token.
    """
    rows = start.shape[0]
    ordinal = start[:, None, None, None] + torch.arange(length)[:, None]
    where = 1000.0 * torch.arange(rows)[:, None, None, None] + 100_000.0 * torch.arange(kv_heads)[:, None, None]
    key, value = (where + ordinal + torch.arange(dim) / 8.0 for dim in (key_dim, value_dim))
    return key, -value


def empty_buffers(plan: SlotPlan, rows: int, kv_heads: int, key_dim: int = 2, value_dim: int = 3) -> list[Tensor]:
    """K, V and positions of one layer that has seen nothing; what K/V hold is left over from somewhere else."""
    shape = (rows, kv_heads, plan.slots)
    positions = torch.arange(plan.slots, dtype=torch.int32).expand(shape).contiguous()
    return [torch.full((*shape, key_dim), 7e6), torch.full((*shape, value_dim), 8e6), positions]


def assert_tokens(held: Tensor, ordinals: Tensor, sign: float) -> None:
    """Check that the slots of a buffer hold `named_tokens` of these ordinals, free slots aside."""
    for row, head, slot in itertools.product(*map(range, ordinals.shape)):
        ordinal = int(ordinals[row, head, slot])
        if ordinal >= 0:
            assert float(held[row, head, slot, 0]) == sign * (1000.0 * row + 100_000.0 * head + ordinal)
