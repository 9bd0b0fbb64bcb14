"""The ops of a cache that keeps the keys of an indexer beside its own, under the namespace `xkv`; importing this module
registers them. Shapes are those of `ops`, and `index_cache [rows, kv_heads, slots, index_dim]`; the indexer's queries,
keys and weights are those of `Index`, for the new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xkv_fx.runtime.attention import (
    apply_sink_logits,
    blocks,
    empty_output,
    merge_attention,
    softmax_block,
    values_of,
    without_slots,
)
from xkv_fx.runtime.form import AttentionForm
from xkv_fx.runtime.indexing import INDEX_BLOCK, highest, index_scores, last_picked
from xkv_fx.runtime.selection import move_vectors


def _pick_slots(
    index_queries: Tensor,
    index_keys: Tensor,
    index_weights: Tensor,
    index_cache: Tensor,
    slot: Tensor,
    mask: Tensor,
    top_k: int,
) -> Tensor:
    """Write the index key of one token a row into its slot, then pick which valid slots the token attends to.

    Args:
        slot: int64 `[rows]`, or `[rows, kv_heads]` where each head has its own.
        mask: additive, `[rows, kv_heads or 1, 1, slots]`: 0 for a valid slot, minus infinity otherwise.

    Returns:
        such a mask, in its dtype, of the slots that were picked: `[rows, kv_heads, 1, slots]`.
    """
    rows, kv_heads = index_cache.shape[:2]
    row = torch.arange(rows, device=slot.device)[:, None]
    head = torch.arange(kv_heads, device=slot.device)
    index_cache.index_put_((row, head, slot.view(rows, -1)), index_keys[:, :, 0].expand(-1, kv_heads, -1))
    scores = index_scores(index_queries, index_cache, index_weights)
    return torch.where(highest(scores, mask == 0, top_k), 0.0, float("-inf")).to(mask.dtype)


pick_slots = torch.library.custom_op("xkv::pick_slots", _pick_slots, mutates_args=("index_cache",))


@pick_slots.register_fake
def _(
    index_queries: Tensor,
    index_keys: Tensor,
    index_weights: Tensor,
    index_cache: Tensor,
    slot: Tensor,
    mask: Tensor,
    top_k: int,
) -> Tensor:
    rows, kv_heads, slots = index_cache.shape[:3]
    return mask.new_empty((rows, kv_heads, 1, slots))


def attend_picked(
    q: Tensor,
    which: Tensor,
    scores: tuple[Tensor, Tensor],
    top_k: int,
    held: tuple[Tensor, Tensor],
    mask: Tensor,
    new: tuple[Tensor, Tensor],
    form: AttentionForm,
) -> tuple[Tensor, Tensor]:
    """Attention of some of the new tokens to the `top_k` that each picks among the slots and the first N new tokens.

    Args:
        q: `[rows, query_heads, queries, key_dim]`.
        which: int64 `[queries]`, their places among the new tokens.
        scores: of the slots and of the new tokens, `[rows, kv_heads or 1, queries, slots or N]`.
        held, new: keys and values of the slots, and of the new tokens.
        mask: bool `[rows, kv_heads or 1, queries or 1, slots]`, slots that a query may attend to.

    Returns:
        output and log-sum-exp.
    """
    causal = which[:, None] >= torch.arange(new[0].shape[2], device=mask.device)
    of_slots, of_new = scores[0].masked_fill(~mask, float("-inf")), scores[1].masked_fill(~causal, float("-inf"))
    last = last_picked(torch.cat((of_slots, of_new.expand(*of_slots.shape[:3], -1)), 3), top_k)
    parts = []
    for (k, v), reached in ((held, mask & (of_slots >= last)), (new, causal & (of_new >= last))):
        parts.append(without_slots(softmax_block(q, k, v, form, reached), q, k, reached))
    return merge_attention(*parts)


@torch.library.custom_op("xkv::extend_indexed", mutates_args=())
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
    """As `xkv::extend_attention`, each new token attending to its `top_k` among the kept slots and the new tokens up to
    itself.

    Returns:
        `[rows, query_heads, S, value_dim]`.
    """
    form, held = AttentionForm(scale, softcap=softcap), (k_cache, values_of(k_cache, v_cache))
    parts = []
    for start, part in blocks(q, INDEX_BLOCK):
        stop = start + part.shape[2]
        queries, weights = index_queries[:, :, start:stop], index_weights[:, start:stop]
        scores = index_scores(queries, index_cache, weights), index_scores(queries, index_keys[:, :, :stop], weights)
        which = torch.arange(start, stop, device=q.device)
        rows = mask if mask.shape[2] == 1 else mask[:, :, start:stop]
        parts.append(attend_picked(part, which, scores, top_k, held, rows, (k[:, :, :stop], v[:, :, :stop]), form))
    out, lse = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return apply_sink_logits(out, lse, sink_logits).contiguous()


extend_indexed.register_fake(empty_output)


def _keep_index(index_keys: Tensor, source: Tensor, index_cache: Tensor, capacity: int, fresh: bool) -> None:
    """Fill the first `capacity` slots with the index keys of the survivors; the arguments are those of `xkv::keep`."""
    new = index_keys.expand(-1, index_cache.shape[1], -1, -1)
    move_vectors(new, source, index_cache, capacity, fresh)


keep_index = torch.library.custom_op("xkv::keep_index", _keep_index, mutates_args=("index_cache",))
keep_index.register_fake(lambda *args, **kwargs: None)


INDEXED_DECOMPOSITIONS: dict[Any, Callable[..., Tensor | None]] = {
    torch.ops.xkv.pick_slots.default: _pick_slots,
    torch.ops.xkv.keep_index.default: _keep_index,
}
"""As `ops.DECOMPOSITIONS`."""
