"""The prompt's attention in forms that neither branch nor loop in Python on the number of tokens, so that a graph that
is traced once is right for every length. Arguments, shapes and dtypes are those of `ops` and `attention`, whose
forms are for known lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from xkv_fx.runtime import coded_ops, ops  # noqa: F401  (register the ops)
from xkv_fx.runtime.attention import (
    BLOCK,
    apply_sink_logits,
    causal_by_flash,
    distance_bias,
    flash_applies,
    merge_attention,
    slots_by_flash,
    softmax_block,
    values_of,
    wide_dtype,
    without_slots,
)
from xkv_fx.runtime.coded import Stored, extend_block, held_keys
from xkv_fx.runtime.form import AttentionForm, Index
from xkv_fx.runtime.indexed_ops import attend_picked
from xkv_fx.runtime.indexing import INDEX_BLOCK, highest, index_scores
from xkv_fx.runtime.scorers import accumulated  # noqa: F401  (registers its op)
from xkv_fx.runtime.scorers.prompt import PromptView

BlockOf = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
    index_queries: Tensor | None = None,
    index_keys: Tensor | None = None,
    index_weights: Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """`xkv::attention`."""
    form = AttentionForm(scale, sliding_window, softcap, slopes=slopes)
    index = Index.of(index_queries, index_keys, index_weights, top_k)
    out, lse = _causal(q, k, v, form) if index is None else _indexed(q, k, v, form, index)
    return apply_sink_logits(out, lse, sink_logits).contiguous()


def extend_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
    ages: Tensor | None = None,
) -> Tensor:
    """`xkv::extend_attention`."""
    form = AttentionForm(scale, sliding_window, softcap, slopes=slopes)
    among_new = _causal(q, k, v, form)
    over_slots = _slots(q, k_cache, values_of(k_cache, v_cache), mask, form, ages)
    out, lse = merge_attention(among_new, over_slots)
    return apply_sink_logits(out, lse, sink_logits).contiguous()


def extend_indexed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor,
    scale: float,
    index_queries: Tensor,
    index_keys: Tensor,
    index_weights: Tensor,
    index_cache: Tensor,
    top_k: int,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """`xkv::extend_indexed`, of a mask that is the same for all new tokens."""
    form = AttentionForm(scale, softcap=softcap)
    values = values_of(k_cache, v_cache)

    def over_both(part: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        queries, weights = index_queries.index_select(2, query), index_weights.index_select(1, query)
        scores = index_scores(queries, index_cache, weights), index_scores(queries, index_keys, weights)
        return attend_picked(part, query, scores, top_k, (k_cache, values), mask, (k, v), form)

    out, lse = _in_blocks(q, v, over_both, INDEX_BLOCK)
    return apply_sink_logits(out, lse, sink_logits).contiguous()


def accumulated_attention(
    q: Tensor,
    k: Tensor,
    length: Tensor,
    scale: float,
    seen: Tensor,
    old_k: Tensor | None = None,
    old_ordinals: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
    old_scales: Tensor | None = None,
    old_mean: Tensor | None = None,
    old_bits: int = 0,
) -> Tensor:
    """`xkv::accumulated_attention`; each block of queries looks at all keys."""
    form = AttentionForm(scale, sliding_window, softcap, sink_logits, slopes)
    held = held_keys(old_k, old_scales, old_bits, k.shape[3], old_mean)
    prompt = PromptView(q, k, None, length, form, seen, held, None, old_ordinals)
    queries = q.shape[2]
    offset = torch.arange(BLOCK, device=q.device)

    def unfinished(start: Tensor, mass: Tensor) -> Tensor:
        return start < queries

    def add_block(start: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        which = start + offset  # past the last query: none of a row's valid ones
        block = q.index_select(2, which.clamp(max=queries - 1))
        paid = prompt._attention(block, which.expand(q.shape[0], -1), queries)
        return start + BLOCK, mass + paid.sum(3).mean(2)

    start = torch.zeros((), dtype=torch.int64, device=q.device)
    mass = torch.zeros(prompt.ordinals.shape, dtype=torch.float32, device=q.device)
    total: Tensor = while_loop(unfinished, add_block, (start, mass))[1]
    return total


def _causal(q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> tuple[Tensor, Tensor]:
    """As `causal_attention`, without sink logits."""
    if form.plain and form.sliding_window is None and flash_applies(q, k, v):
        return causal_by_flash(q, k, v, form.scale)
    slopes = form.slopes
    length = q.shape[2]

    def over_all(part: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        distance = query[:, None] - torch.arange(length, device=q.device)
        bias = None if slopes is None else distance_bias(slopes, distance[None, None])
        return softmax_block(part, k, v, form, (distance >= 0)[None, None], bias)

    if form.sliding_window is None:
        return _in_blocks(q, v, over_all)
    window = form.sliding_window

    def over_window(part: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        key = query[0] - (window - 1) + torch.arange(BLOCK + window - 1, device=q.device)
        distance = query[:, None] - key
        mask = (distance >= 0) & (distance < window) & (key >= 0)
        near_k, near_v = (values.index_select(2, key.clamp(0, length - 1)) for values in (k, v))
        bias = None if slopes is None else distance_bias(slopes, distance[None, None])
        return softmax_block(part, near_k, near_v, form, mask[None, None], bias)

    return _in_blocks(q, v, over_window)


def _indexed(q: Tensor, k: Tensor, v: Tensor, form: AttentionForm, index: Index) -> tuple[Tensor, Tensor]:
    """As `_causal`, of queries that reach what an indexer picks."""
    length = q.shape[2]

    def over_picked(part: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        queries, weights = index.queries.index_select(2, query), index.weights.index_select(1, query)
        causal = (query[:, None] >= torch.arange(length, device=q.device))[None, None]
        reached = highest(index_scores(queries, index.keys, weights), causal, index.top_k)
        return softmax_block(part, k, v, form, reached)

    return _in_blocks(q, v, over_picked, INDEX_BLOCK)


def _slots(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, form: AttentionForm, ages: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `slot_attention`."""
    slopes = form.slopes
    if form.plain and mask.shape[1] == 1 and flash_applies(q, k, v):
        return without_slots(slots_by_flash(q, k, v, mask, form.scale), q, k, mask)
    every_query = bool(mask.shape[2] == 1)  # a symbolic bool would be an input of the loop, which Dynamo cannot guard

    def over_slots(part: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        bias = None
        if slopes is not None and ages is not None:
            bias = distance_bias(slopes, ages[:, :, None] + query[:, None])
        return softmax_block(part, k, v, form, mask if every_query else mask.index_select(2, query), bias)

    return without_slots(_in_blocks(q, v, over_slots), q, k, mask)


def _in_blocks(q: Tensor, v: Tensor, attend: BlockOf, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of attention that is computed for `block` queries at a time.

    Args:
        attend: gives both for `queries [rows, query_heads, block, key_dim]` and their places int64 `[block]`. The last
            block is filled up with copies of the last query.
    """
    length = q.shape[2]
    offset = torch.arange(block, device=q.device)

    def unfinished(start: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        return start < length

    def add_block(start: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query = (start + offset).clamp(max=length - 1)
        part_out, part_lse = attend(q.index_select(2, query), query)
        return start + block, out.index_copy(2, query, part_out), lse.index_copy(2, query, part_lse)

    start = torch.zeros((), dtype=torch.int64, device=q.device)
    out = q.new_zeros((*q.shape[:3], v.shape[-1]))
    lse = torch.zeros(q.shape[:3], dtype=wide_dtype(q), device=q.device)
    _, out, lse = while_loop(unfinished, add_block, (start, out, lse))
    return out, lse


def extend_coded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    k_scales: Tensor,
    v_cache: Tensor,
    v_scales: Tensor,
    mask: Tensor,
    scale: float,
    key_bits: int,
    value_bits: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
    ages: Tensor | None = None,
    key_mean: Tensor | None = None,
) -> Tensor:
    """`xkv::extend_coded`."""
    form = AttentionForm(scale, sliding_window, softcap, slopes=slopes)
    buffers, bits = (k_cache, k_scales, v_cache, v_scales), (key_bits, value_bits)
    keys, values = Stored.pair(buffers, bits, (k.shape[-1], v.shape[-1]), key_mean)

    def over_slots(part: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        return extend_block(part, query, keys, values, mask, form, ages)

    attended = without_slots(_in_blocks(q, v, over_slots), q, k, mask)
    out, lse = merge_attention(_causal(q, k, v, form), attended)
    return apply_sink_logits(out, lse, sink_logits).contiguous()


ANY_LENGTH: dict[Any, Callable[..., Tensor]] = {
    torch.ops.xkv.attention.default: attention,
    torch.ops.xkv.extend_attention.default: extend_attention,
    torch.ops.xkv.extend_coded.default: extend_coded,
    torch.ops.xkv.extend_indexed.default: extend_indexed,
    torch.ops.xkv.accumulated_attention.default: accumulated_attention,
}
"""What takes an op's place where the number of tokens is a symbol."""
