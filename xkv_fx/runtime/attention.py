"""The forms of attention that a budgeted model needs, in plain torch; every one also returns its log-sum-exp.

Shapes: queries `[rows, query_heads, S, key_dim]`, keys `[rows, kv_heads, N, key_dim]`, values
`[rows, kv_heads, N, value_dim]`; query head h reads KV head `h // (query_heads // kv_heads)`. K/V are never repeated.
Logits, softmax and log-sum-exp are float32, or float64 where the inputs are.

Where one of torch's kernels fits and returns the log-sum-exp, it is used: flash attention on CPU, and what
`attention_cuda` says on CUDA. All else is done in blocks of queries by matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xkv_fx.runtime import attention_cuda
from xkv_fx.runtime.form import AttentionForm
from xkv_fx.runtime.indexing import INDEX_BLOCK, reached_by_index

# Queries handled at once where no flash kernel applies; bounds the logits to BLOCK x N per head.
BLOCK = 256


def empty_output(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    """What ops of attention return to fake tensors: `[rows, query_heads, S, value_dim]`."""
    return q.new_empty((*q.shape[:3], v.shape[-1]))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> tuple[Tensor, Tensor]:
    """Causal attention of S queries over their own S keys.

    Returns:
        the output `[rows, query_heads, S, value_dim]` and the log-sum-exp `[rows, query_heads, S]` of the logits
        without the sink logits.
    """
    windowed = form.sliding_window is not None and k.shape[2] > form.sliding_window
    plain = form.plain and not windowed
    if plain and flash_applies(q, k, v):
        out, lse = causal_by_flash(q, k, v, form.scale)
    elif plain and attention_cuda.flash_applies(q, k, v):
        out, lse = attention_cuda.causal_by_flash(q, k, v, form.scale)
    else:
        out, lse = _causal_in_blocks(q, k, v, form if windowed else form.within(None))
    return apply_sink_logits(out, lse, form.sink_logits), lse


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, form: AttentionForm, ages: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of S queries over the kept slots of a cache, all of them earlier than every query.

    The mask says what is reached; sliding window and sink logits of the form are left to the caller.

    Args:
        mask: bool, broadcastable to `[rows, kv_heads, S, slots]`; True where a slot may be attended to.
        ages: int64 `[rows, kv_heads, slots]`, the distance of each slot's token from the first query; with slopes.

    Returns:
        as `causal_attention`; a query without any slot gets output 0 and a log-sum-exp of minus infinity.
    """
    if form.plain and flash_applies(q, k, v) and mask.shape[1] == 1:
        out, lse = slots_by_flash(q, k, v, mask, form.scale)
    elif form.plain and attention_cuda.bias_applies(q, k, v, mask):
        out, lse = attention_cuda.slots_by_bias(q, k, v, mask, form.scale)
    else:
        parts = [
            softmax_block(
                part, k, v, form, _rows_of(mask, start, start + BLOCK), _slot_bias(form.slopes, ages, start, part)
            )
            for start, part in blocks(q, BLOCK)
        ]
        out, lse = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return without_slots((out, lse), q, k, mask)


def flash_applies(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch has a flash kernel that returns the log-sum-exp for these."""
    return q.device.type == "cpu" and k.shape[-1] == v.shape[-1]


def causal_by_flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`causal_attention` by torch's flash kernel."""
    q, k, v = map(_side_by_side, (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return out, lse


def slots_by_flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`slot_attention` by torch's flash kernel; queries without a slot get anything."""
    q, k, v = map(_side_by_side, (q, k, v))
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=bias, scale=scale
    )
    return out, lse


def _side_by_side(states: Tensor) -> Tensor:
    """torch's CPU kernel takes for granted that the elements of a head lie side by side in memory."""
    return states if states.stride(-1) == 1 else states.contiguous()


def without_slots(attended: tuple[Tensor, Tensor], q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Output 0 and a log-sum-exp of minus infinity for queries that `mask` gives no slot."""
    out, lse = attended
    group = q.shape[1] // k.shape[1]
    empty = (~mask.any(-1)).expand(-1, k.shape[1], q.shape[2]).repeat_interleave(group, 1)
    return out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, float("-inf"))


def merge_attention(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the outputs and log-sum-exps over each."""
    (out_a, lse_a), (out_b, lse_b) = first, second
    lse = torch.logaddexp(_wide(lse_a), _wide(lse_b))
    weight_a, weight_b = (torch.exp(part - lse)[..., None] for part in (lse_a, lse_b))
    return (out_a.to(lse.dtype) * weight_a + out_b.to(lse.dtype) * weight_b).to(out_a.dtype), lse


def apply_sink_logits(out: Tensor, lse: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Add one learned logit per head, `[query_heads]`, to the softmax's denominator (gpt-oss)."""
    if sink_logits is None:
        return out
    keep = torch.sigmoid(lse - sink_logits.to(lse.dtype)[None, :, None])
    return (out.to(lse.dtype) * keep[..., None]).to(out.dtype)


def soft_cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Bound logits to (-softcap, softcap) by a scaled tanh (Gemma 2)."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def group_logits(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Logits `[rows, kv_heads, group, S, N]`, the query group kept beside its KV head."""
    rows, heads, length, dim = q.shape
    grouped = q.reshape(rows, k.shape[1], heads // k.shape[1], length, dim)
    return soft_cap(torch.matmul(_wide(grouped), _wide(k).transpose(-1, -2)[:, :, None]) * scale, softcap)


def wide_dtype(values: Tensor) -> torch.dtype:
    """The dtype that logits of `values` are computed in."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32  # promote_types cannot be traced in a loop


def values_of(k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """The values in the slots. Where values are the keys and stored once, `v_cache` is empty and these are the keys."""
    return v_cache if v_cache.shape[-1] else k_cache


def _wide(values: Tensor) -> Tensor:
    return values.to(wide_dtype(values))


def distance_bias(slopes: Tensor, distance: Tensor) -> Tensor:
    """What is added to logits under `slopes` `[query_heads]`.

    Args:
        distance: tokens between a query and a key, `[rows or 1, kv_heads or 1, S, N]`.

    Returns:
        float32 `[rows or 1, kv_heads, group, S, N]`; `[rows or 1, 1, query_heads, S, N]` for distances of all heads.
    """
    return -slopes.float().view(1, distance.shape[1], -1, 1, 1) * distance[:, :, None]


def _slot_bias(slopes: Tensor | None, ages: Tensor | None, start: int, part: Tensor) -> Tensor | None:
    if slopes is None or ages is None:
        return None
    query = torch.arange(start, start + part.shape[2], device=part.device)
    return distance_bias(slopes, ages[:, :, None] + query[:, None])


def softmax_block(
    q: Tensor, k: Tensor, v: Tensor, form: AttentionForm, mask: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a block of queries, with all of its logits at once.

    Args:
        mask: bool, broadcastable to `[rows, kv_heads, S, N]`.
        bias: added to the logits, as `distance_bias` gives it.
    """
    logits = group_logits(q, k, form.scale, form.softcap)
    if bias is not None:
        logits += bias.reshape(bias.shape[0], *logits.shape[1:3], *bias.shape[3:])
    logits = logits.masked_fill_(~mask[:, :, None], float("-inf"))
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out = torch.matmul(weights, _wide(v)[:, :, None])
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def _causal_in_blocks(q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> tuple[Tensor, Tensor]:
    outs, lses, window = [], [], form.sliding_window
    for start, part in blocks(q, BLOCK if form.index is None else INDEX_BLOCK):
        stop = start + part.shape[2]
        first = 0 if window is None else max(0, start - window + 1)
        query = torch.arange(start, stop, device=q.device)[:, None]
        key = torch.arange(first, stop, device=q.device)[None]
        mask = key <= query
        if window is not None:
            mask &= key > query - window
        reached = mask[None, None]
        if form.index is not None:
            reached = reached_by_index(form.index, slice(start, stop), slice(first, stop), reached)
        bias = None if form.slopes is None else distance_bias(form.slopes, (query - key)[None, None])
        out, lse = softmax_block(part, k[:, :, first:stop], v[:, :, first:stop], form, reached, bias)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def blocks(q: Tensor, size: int) -> list[tuple[int, Tensor]]:
    """The queries `size` at a time, and where each block begins."""
    return [(start, q[:, :, start : start + size]) for start in range(0, q.shape[2], size)]


def _rows_of(mask: Tensor, start: int, stop: int) -> Tensor:
    return mask if mask.shape[2] == 1 else mask[:, :, start:stop]
