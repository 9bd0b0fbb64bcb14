"""The budgeted ops, under the `torch.library` namespace `xkv`; importing this module registers them.

Every op declares what it mutates, takes no strings and has a fake kernel. Its kernel is plain torch, so that a lowering
may trace through it (`DECOMPOSITIONS`); `tests/oracles` holds an independent, slow statement of each.

Shapes: new tokens `q [rows, query_heads, S, key_dim]`, `k [rows, kv_heads, S, key_dim]`,
`v [rows, kv_heads, S, value_dim]`; a layer's buffers `k_cache [rows, kv_heads, slots, key_dim]`,
`v_cache [rows, kv_heads, slots, value_dim]`, `positions [rows, kv_heads, slots]` int32. Where the values are the keys
themselves (`v` is `k`, as with an MLA latent), they are stored once: `v_cache [rows, kv_heads, slots, 0]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xkv_fx.runtime.attention import (
    apply_sink_logits,
    causal_attention,
    empty_output,
    group_logits,
    merge_attention,
    slot_attention,
    values_of,
)
from xkv_fx.runtime.form import AttentionForm, Index
from xkv_fx.runtime.selection import move_survivors


@torch.library.custom_op("xkv::attention", mutates_args=())
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
    """Causal attention of S tokens over themselves; what a model's attention becomes when it is captured.

    Args:
        layer: which layer calls it, for the passes; no effect on the result.
        scale: factor on the logits.
        sliding_window: attend to the newest so many tokens only, the query's own included.
        softcap: bound on the logits' size.
        sink_logits: `[query_heads]`, one more logit per head in the softmax's denominator.
        slopes: `[query_heads]`, what a logit loses for each token between query and key (ALiBi, arXiv 2108.12409).
        index_queries, index_keys, index_weights, top_k: as in `Index`, all of them or none.

    Returns:
        `[rows, query_heads, S, value_dim]`.
    """
    index = Index.of(index_queries, index_keys, index_weights, top_k)
    form = AttentionForm(scale, sliding_window, softcap, sink_logits, slopes, index)
    return causal_attention(q, k, v, form)[0].contiguous()


@torch.library.custom_op("xkv::extend_attention", mutates_args=())
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
    """Attention of S new tokens over the kept slots and causally over themselves, merged by log-sum-exp.

    Args:
        mask: bool `[rows, kv_heads or 1, S or 1, slots]`, slots that a query may attend to.
        slopes, ages: as in `slot_attention`.

    Returns:
        `[rows, query_heads, S, value_dim]`.
    """
    form = AttentionForm(scale, sliding_window, softcap, slopes=slopes)
    among_new = causal_attention(q, k, v, form)
    over_slots = slot_attention(q, k_cache, values_of(k_cache, v_cache), mask, form, ages)
    out, lse = merge_attention(among_new, over_slots)
    return apply_sink_logits(out, lse, sink_logits).contiguous()


def _keep(
    k: Tensor,
    v: Tensor,
    source: Tensor,
    placed: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    capacity: int,
    fresh: bool,
) -> None:
    """Fill the first `capacity` slots of a layer's buffers with survivors of its old slots and the new tokens.

    Args:
        source: int64 `[rows, kv_heads, capacity]`, where each slot's token is now: an index into the old slots,
            followed by the new tokens.
        placed: int32 `[rows, kv_heads, slots]`, the `positions` afterwards.
        fresh: the buffers count as empty, whatever they hold.
    """
    move_survivors(k, v, source, placed, k_cache, v_cache, positions, capacity, fresh)


keep = torch.library.custom_op("xkv::keep", _keep, mutates_args=("k_cache", "v_cache", "positions"))


keep.register_fake(lambda *args, **kwargs: None)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Write one token a row into its slot, then attend to every valid slot.

    Args:
        q, k, v: one token, S = 1.
        slot: int64 `[rows]`, the slot that the token takes.
        mask: additive, `[rows, kv_heads or 1, 1, slots]` in q's dtype: 0 for a valid slot, minus infinity otherwise;
            or with a bias for valid slots, `[rows, query_heads, 1, slots]`, float32.

    Returns:
        `[rows, query_heads, 1, value_dim]`.
    """
    write_token(k, v, k_cache, v_cache, slot)
    return attend_slots(q, k_cache, v_cache, mask, scale, softcap, sink_logits)


def write_token(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Write one token a row into its slot.

    Args:
        slot: int64 `[rows]`, or `[rows, kv_heads]` where each head has its own.

    Returns:
        the indices of those slots along the first two axes.
    """
    rows, kv_heads = k.shape[:2]
    row = torch.arange(rows, device=k.device)[:, None]
    head = torch.arange(kv_heads, device=k.device)
    slots = slot.view(rows, -1)
    k_cache.index_put_((row, head, slots), k[:, :, 0])
    if v_cache.shape[-1]:
        v_cache.index_put_((row, head, slots), v[:, :, 0])
    return row, head


def attend_slots(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """The attention of `decode_attention`, to slots that hold the new token already."""
    if softcap is not None or sink_logits is not None or mask.dtype != q.dtype:
        return attend_and_count(q, k_cache, v_cache, mask, scale, softcap, sink_logits)[0]
    rows, kv_heads = k_cache.shape[:2]
    v_cache = values_of(k_cache, v_cache)
    grouped = q.reshape(rows, kv_heads, -1, q.shape[-1])  # the query group takes the place of the query length
    mask = _by_group(mask, kv_heads)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, k_cache, v_cache, attn_mask=mask, scale=scale)
    return out.reshape(rows, -1, 1, v_cache.shape[-1])


def attend_and_count(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention of `decode_scored`, to slots that hold the new token already.

    Returns:
        `[rows, query_heads, 1, value_dim]`, and the mean over each query group of the attention to each slot, float32
        `[rows, kv_heads, slots]`.
    """
    rows, kv_heads = k_cache.shape[:2]
    v_cache = values_of(k_cache, v_cache)
    logits = group_logits(q, k_cache, scale, softcap)[:, :, :, 0] + _by_group(mask, kv_heads)
    lse = torch.logsumexp(logits, -1, keepdim=True)
    weights = torch.exp(logits - lse)
    out = torch.matmul(weights.to(v_cache.dtype), v_cache).reshape(rows, -1, 1, v_cache.shape[-1])
    lse = lse.reshape(rows, -1, 1)
    attention = apply_sink_logits(weights.flatten(1, 2)[:, :, None], lse, sink_logits).view(weights.shape).mean(2)
    return apply_sink_logits(out, lse, sink_logits), attention


def _by_group(mask: Tensor, kv_heads: int) -> Tensor:
    """A mask of decode as `[rows, kv_heads or 1, group or 1, slots]`."""
    return mask if mask.shape[1] in (1, kv_heads) else mask.reshape(mask.shape[0], kv_heads, -1, mask.shape[-1])


decode_attention = torch.library.custom_op("xkv::decode_attention", _decode, mutates_args=("k_cache", "v_cache"))


def _decode_scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scores: Tensor,
    slot: Tensor,
    mask: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """As `decode_attention`, each KV head with a slot of its own, and each slot's attention added to its score (H2O,
    arXiv 2306.14048, section 4): the mean over the query group. The new token's score starts at 0.

    Args:
        scores: float32 `[rows, kv_heads, slots]`.
        slot: int64 `[rows, kv_heads]`, the slot that the token takes in each head.
        seen: int64 `[rows]`, tokens seen before this one.
    """
    row, head = write_token(k, v, k_cache, v_cache, slot)
    positions.index_put_((row, head, slot), seen[:, None].expand_as(slot).to(positions.dtype))
    scores.index_put_((row, head, slot), torch.zeros_like(slot, dtype=scores.dtype))
    out, attention = attend_and_count(q, k_cache, v_cache, mask, scale, softcap, sink_logits)
    scores.add_(attention)
    return out


decode_scored = torch.library.custom_op(
    "xkv::decode_scored", _decode_scored, mutates_args=("k_cache", "v_cache", "positions", "scores")
)


for _op in (attention, extend_attention, decode_attention, decode_scored):
    _op.register_fake(empty_output)


DECOMPOSITIONS: dict[Any, Callable[..., Tensor | None]] = {
    torch.ops.xkv.keep.default: _keep,
    torch.ops.xkv.decode_attention.default: _decode,
    torch.ops.xkv.decode_scored.default: _decode_scored,
}
"""What a lowering may put in place of an op: a function of plain aten ops that does not ask how long a prompt is. Those
of the prompt's attention are in `any_length`."""
