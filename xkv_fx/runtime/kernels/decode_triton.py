"""Decode attention on GPU by a Triton kernel.

One pass reads each kept K/V once: the queries that share a KV head are the rows of a tile, and the slots of a layer are
split over programs where there are too few rows and heads to fill the GPU. The same launch writes the new token's K/V.
It is read from the arguments and never from its slot, so that no program waits for the one that writes. Where there is
more than one split, a second, small kernel merges them by their log-sum-exp, in a fixed order. Under eviction by score
the pass also leaves its logits, 4 bytes for each query head and slot, and a third kernel turns them into what each slot
gains, once the sum that they are divided by is known.

Arithmetic is float32 whatever the dtype of the cache. K/V buffers are contiguous. Importing this module imports triton,
which only a lowering for GPU needs; it registers two `torch.library.triton_op`s, which Inductor and AOTInductor see
into.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_QUERY_BYTES = 16 * 1024
"""Of the query group of one KV head, padded; more would not fit the registers."""
_LEAST_ROWS = _LEAST_DIMS = 16  # of a matrix product
_TILE_BYTES = 16 * 1024  # of keys, and again of values
_LEAST_SLOTS = 128  # of a split, for which its part of the merging is worth while
_PROGRAMS = 4  # programs for each multiprocessor, so that none is idle for long at the end
_MERGED_AT_ONCE = 16
_SCORED_AT_ONCE = 128


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the work of one attention is laid out; no effect on the result beyond rounding.

    Attributes:
        splits: programs that share the slots of one row and KV head.
        block: slots read at once, a power of two of at least 16.
        warps, stages: of Triton.
    """

    splits: int
    block: int
    warps: int = 4
    stages: int = 3


def plan_launch(
    rows: int, kv_heads: int, slots: int, key_dim: int, value_dim: int, dtype: torch.dtype, processors: int
) -> Launch:
    """A layout for a GPU of so many multiprocessors, from shapes alone: no timing, the same on every run."""
    widest = max(padded(key_dim), padded(value_dim)) * dtype.itemsize
    block = max(16, min(128, _TILE_BYTES // widest))
    wanted = -(-_PROGRAMS * processors // (rows * kv_heads))
    return Launch(max(1, min(wanted, slots // _LEAST_SLOTS)), block)


def query_bytes(group: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
    """What a query group, or its output if that is wider, takes in the kernel."""
    return padded_rows(group) * max(padded(key_dim), padded(value_dim)) * dtype.itemsize


@triton.jit
def cap(x, softcap):
    """softcap * tanh(x / softcap); Triton has no tanh of its own."""
    shrunk = tl.exp(-2.0 * tl.abs(x) / softcap)
    size = softcap * (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0.0, -size, size)


# Helpers return no place that is stored to: torch takes what a helper returns to come from all of its arguments, and
# would hold each of them for changed in place.


@triton.jit
def mask_of(mask, row, head, slots, GROUP: tl.constexpr, MASK_HEADS: tl.constexpr, BIASED: tl.constexpr):
    """Where the mask of a row and KV head starts."""
    mask += row * MASK_HEADS * slots
    if BIASED:
        mask += head * GROUP * slots
    elif MASK_HEADS > 1:
        mask += head * slots
    return mask


@triton.jit
def masked(
    x, mask, logits, g, n, is_query, valid, softcap, slots,
    BIASED: tl.constexpr, SCORED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """The logits `[ROWS, BLOCK]` of a block of slots from scaled products: capped, with the mask added, minus infinity
    for slots that are not valid. Eviction by score keeps them in `logits`."""
    if CAPPED:
        x = cap(x, softcap)
    if BIASED:
        bias = mask + g[:, None] * slots + n[None, :]
        x += tl.load(bias, mask=is_query[:, None] & valid[None, :], other=0.0).to(tl.float32)
    else:
        x += tl.load(mask + n, mask=valid, other=0.0).to(tl.float32)[None, :]
    x = tl.where(valid[None, :], x, float("-inf"))
    if SCORED:
        tl.store(logits + g[:, None] * slots + n[None, :], x, mask=is_query[:, None] & valid[None, :])
    return x


@triton.jit
def next_softmax(x, maximum, total):
    """The running softmax one block of logits further: the block's weights, what older sums are multiplied by, and the
    new maximum and total."""
    highest = tl.maximum(maximum, tl.max(x, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp(x - base[:, None])
    shrink = tl.exp(maximum - base)
    return weight, shrink, highest, total * shrink + tl.sum(weight, 1)


@triton.jit
def with_sink(sink_logits, head, g, is_query, maximum, total, GROUP: tl.constexpr):
    """The total with the sink logits in it, and what sums are multiplied by then."""
    sink = tl.load(sink_logits + head * GROUP + g, mask=is_query, other=0.0).to(tl.float32)
    highest = tl.maximum(maximum, sink)
    shrink = tl.exp(maximum - highest)
    return total * shrink + tl.exp(sink - highest), shrink


@triton.jit
def store_lse(lse, split, pair, g, is_query, maximum, total, GROUP: tl.constexpr):
    """Stores the log-sum-exp of one split."""
    empty = total == 0.0
    level = tl.where(empty, float("-inf"), maximum + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse + (split * tl.num_programs(0) + pair) * GROUP + g, level, mask=is_query)


@triton.jit
def _attend(
    q, k, v, k_cache, v_cache, slot, count, mask, positions, seen, sink_logits, out, lse, logits, scale, softcap,
    kv_heads, slots, split_size,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    MASK_HEADS: tl.constexpr,  # 1, or KV heads, or query heads when BIASED
    BIASED: tl.constexpr, SCORED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    ONE_SPLIT: tl.constexpr,  # one split: `out` is the result, not a part of it
    WIDEN: tl.constexpr, ROWS: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of the slots of one row and KV head, for all of its queries."""
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = pair // kv_heads
    head = pair % kv_heads
    g = tl.arange(0, ROWS)
    d = tl.arange(0, KEY_PAD)
    e = tl.arange(0, VALUE_PAD)
    is_query = g < GROUP
    is_key_dim = d < KEY_DIM
    is_value_dim = e < VALUE_DIM

    start = split * split_size
    stop = tl.minimum(start + split_size, tl.load(count + row)).to(tl.int32)
    taken = tl.load(slot + (pair if SCORED else row))
    token = tl.load(seen + row)
    mine = (taken >= start) & (taken < start + split_size)
    k_cache += pair * slots * KEY_DIM
    v_cache += pair * slots * VALUE_DIM
    positions += pair * slots
    logits += pair * GROUP * slots
    mask = mask_of(mask, row, head, slots, GROUP, MASK_HEADS, BIASED)

    query = tl.load(
        q + (pair * GROUP + g)[:, None] * KEY_DIM + d[None, :], mask=is_query[:, None] & is_key_dim[None, :], other=0.0
    )
    new_key = tl.load(k + pair * KEY_DIM + d, mask=is_key_dim, other=0.0)
    new_value = tl.load(v + pair * VALUE_DIM + e, mask=is_value_dim, other=0.0)

    # The new token, from the arguments: the running softmax of the split that owns its slot starts with it.
    logit = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
    if CAPPED:
        logit = cap(logit, softcap)
    own = mask + (g * slots if BIASED else g * 0) + taken
    logit += tl.load(own, mask=is_query & mine, other=0.0).to(tl.float32)
    if SCORED:
        tl.store(logits + g * slots + taken, logit, mask=is_query & mine)
        tl.store(positions + taken, token.to(tl.int32), mask=mine)
    tl.store(k_cache + taken * KEY_DIM + d, new_key, mask=is_key_dim & mine)
    tl.store(v_cache + taken * VALUE_DIM + e, new_value, mask=is_value_dim & mine)
    maximum = tl.where(mine, logit, float("-inf"))
    total = tl.where(mine & (logit != float("-inf")), 1.0, 0.0)
    values = total[:, None] * new_value.to(tl.float32)[None, :]
    if WIDEN:
        query = query.to(tl.float32)

    for first in range(start, stop, BLOCK):
        n = first + tl.arange(0, BLOCK)
        valid = (n < stop) & (n != taken)
        key = tl.load(
            k_cache + n.to(tl.int64)[:, None] * KEY_DIM + d[None, :],
            mask=valid[:, None] & is_key_dim[None, :],
            other=0.0,
        )
        value = tl.load(
            v_cache + n.to(tl.int64)[:, None] * VALUE_DIM + e[None, :],
            mask=valid[:, None] & is_value_dim[None, :],
            other=0.0,
        )
        if WIDEN:
            key = key.to(tl.float32)
        x = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        x = masked(x, mask, logits, g, n, is_query, valid, softcap, slots, BIASED, SCORED, CAPPED)
        weight, shrink, maximum, total = next_softmax(x, maximum, total)
        weight = weight.to(value.dtype)
        if WIDEN:
            weight = weight.to(tl.float32)
            value = value.to(tl.float32)
        values = values * shrink[:, None] + tl.dot(weight, value, input_precision="ieee")

    if ONE_SPLIT:
        if SINKS:
            total, shrink = with_sink(sink_logits, head, g, is_query, maximum, total, GROUP)
            values = values * shrink[:, None]
    else:
        store_lse(lse, split, pair, g, is_query, maximum, total, GROUP)
        out += split.to(tl.int64) * tl.num_programs(0) * GROUP * VALUE_DIM
    values = values / tl.where(total == 0.0, 1.0, total)[:, None]
    place = out + (pair * GROUP + g)[:, None] * VALUE_DIM + e[None, :]
    tl.store(place, values.to(out.dtype.element_ty), mask=is_query[:, None] & is_value_dim[None, :])


@triton.jit
def _merge(
    parts, lse, sink_logits, out, whole_lse, query_heads, splits,
    VALUE_DIM: tl.constexpr, SINKS: tl.constexpr, VALUE_PAD: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One query's output from the outputs of its splits, and the log-sum-exp of all of its logits, the sink's too."""
    query = tl.program_id(0).to(tl.int64)
    queries = tl.num_programs(0).to(tl.int64)
    e = tl.arange(0, VALUE_PAD)
    if SINKS:
        maximum = tl.load(sink_logits + query % query_heads).to(tl.float32)
        total = maximum * 0.0 + 1.0
    else:
        maximum = query.to(tl.float32) * 0.0 + float("-inf")
        total = query.to(tl.float32) * 0.0
    values = tl.zeros([VALUE_PAD], tl.float32)
    for first in range(0, splits, AT_ONCE):
        s = first + tl.arange(0, AT_ONCE)
        level = tl.load(lse + s * queries + query, mask=s < splits, other=float("-inf"))
        highest = tl.maximum(maximum, tl.max(level, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp(level - base)
        shrink = tl.exp(maximum - base)
        part = tl.load(
            parts + (s * queries + query)[:, None] * VALUE_DIM + e[None, :],
            mask=(s < splits)[:, None] & (e < VALUE_DIM)[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(weight, 0)
        values = values * shrink + tl.sum(weight[:, None] * part, 0)
        maximum = highest
    tl.store(out + query * VALUE_DIM + e, (values / total).to(out.dtype.element_ty), mask=e < VALUE_DIM)
    tl.store(whole_lse + query, maximum + tl.log(total))


@triton.jit
def _add_scores(
    logits, whole_lse, slot, count, scores, kv_heads, slots,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds what the queries of one row and KV head paid to the scores of some slots; the new token's starts at 0."""
    pair = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.arange(0, ROWS)
    read = (g < GROUP)[:, None] & (n < tl.load(count + pair // kv_heads))[None, :]
    x = tl.load(logits + (pair * GROUP + g)[:, None] * slots + n[None, :], mask=read, other=float("-inf"))
    level = tl.load(whole_lse + pair * GROUP + g, mask=g < GROUP, other=0.0)
    gained = tl.sum(tl.exp(x - level[:, None]), 0) / GROUP
    place = scores + pair * slots + n
    before = tl.load(place, mask=n < slots, other=0.0)
    tl.store(place, tl.where(n == tl.load(slot + pair), 0.0, before) + gained, mask=n < slots)


@triton_op("xkv::decode_attention_triton", mutates_args=("k_cache", "v_cache"))
def decode_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    mask: Tensor,
    count: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    splits: int,
    block: int,
    warps: int,
    stages: int,
) -> Tensor:
    """As `xkv::decode_attention`, which says what the other arguments are.

    Args:
        count: int64 `[rows]`, one more than the last slot that the mask lets through; later ones are not read.
        splits, block, warps, stages: as in `Launch`.
    """
    launch = Launch(splits, block, warps, stages)
    return _decode(q, k, v, k_cache, v_cache, slot, mask, count, scale, softcap, sink_logits, launch)


@triton_op("xkv::decode_scored_triton", mutates_args=("k_cache", "v_cache", "positions", "scores"))
def decode_scored_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scores: Tensor,
    slot: Tensor,
    mask: Tensor,
    count: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    splits: int,
    block: int,
    warps: int,
    stages: int,
) -> Tensor:
    """As `xkv::decode_scored`, which says what the other arguments are; `count`, `splits` and so on as in
    `decode_attention_triton`."""
    launch = Launch(splits, block, warps, stages)
    scored = positions, scores, seen
    return _decode(q, k, v, k_cache, v_cache, slot, mask, count, scale, softcap, sink_logits, launch, scored)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    mask: Tensor,
    count: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    launch: Launch,
    scored: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Both ops."""
    buffers = {"k_cache": k_cache, "v_cache": v_cache}
    key_dim, value_dim = k.shape[3], v.shape[3]
    own = {"KEY_DIM": key_dim, "KEY_PAD": padded(key_dim), "VALUE_DIM": value_dim, "VALUE_PAD": padded(value_dim)}
    return decode(
        wrap_triton(_attend), q, k, v, buffers, slot, mask, count, scale, softcap, sink_logits, launch, scored, own
    )


def decode(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buffers: dict[str, Tensor],
    slot: Tensor,
    mask: Tensor,
    count: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    launch: Launch,
    scored: tuple[Tensor, Tensor, Tensor] | None,
    own: dict[str, Any],
) -> Tensor:
    """Launches a kernel over the slots, and what merges its splits and adds to scores.

    A launch needs a tensor even for arguments it does not use: it gets some other tensor, and a constant to ignore it.
    Triton's interpreter multiplies the raw bits of bfloat16 matrices, so under it they are widened first.

    Args:
        kernel: wrapped by `wrap_triton`.
        buffers: what it takes of the cache, by name; `k_cache` is `[rows, kv_heads, slots, ...]`.
        scored: positions, scores and the tokens seen, where scores are kept.
        own: arguments that only this kernel takes.
    """
    rows, kv_heads, slots = buffers["k_cache"].shape[:3]
    heads, value_dim = q.shape[1], v.shape[3]
    group, size = heads // kv_heads, split_size(slots, launch)
    splits = -(-slots // size)
    one_split = splits == 1 and scored is None
    q, mask = q.contiguous(), mask.contiguous()
    positions, scores, seen = (slot, slot, slot) if scored is None else scored
    buffers = {name: buffer if buffer.numel() else q for name, buffer in buffers.items()}

    out = q.new_empty((rows, heads, 1, value_dim))
    narrow: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    parts = out if one_split else torch.empty((splits, rows * heads, value_dim), **narrow)
    lse = q if one_split else torch.empty((splits, rows * heads), **narrow)
    logits = q if scored is None else torch.empty((rows, heads, slots), **narrow)
    kernel[(rows * kv_heads, splits)](
        q=q, k=k.contiguous(), v=v.contiguous(), **buffers, slot=slot, count=count, mask=mask, positions=positions,
        seen=seen, sink_logits=q if sink_logits is None else sink_logits, out=parts, lse=lse, logits=logits,
        scale=scale, softcap=softcap or 1.0, kv_heads=kv_heads, slots=slots, split_size=size, GROUP=group,
        MASK_HEADS=mask.shape[1], BIASED=mask.shape[1] not in (1, kv_heads), SCORED=scored is not None,
        CAPPED=softcap is not None, SINKS=sink_logits is not None, ONE_SPLIT=one_split,
        WIDEN=_interpreted() and q.dtype == torch.bfloat16, ROWS=padded_rows(group), BLOCK=launch.block, **own,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    if not one_split:
        kept = None if scored is None else scores
        _merge_parts(out, parts, lse, logits, slot, count, kept, sink_logits, kv_heads, slots)
    return out


def _merge_parts(
    out: Tensor,
    parts: Tensor,
    lse: Tensor,
    logits: Tensor,
    slot: Tensor,
    count: Tensor,
    scores: Tensor | None,
    sink_logits: Tensor | None,
    kv_heads: int,
    slots: int,
) -> None:
    """Fill `out` from the parts that splits left, and add to the scores, if there are any, what each slot was paid."""
    rows, heads, _, value_dim = out.shape
    group = heads // kv_heads
    whole_lse = torch.empty((rows * heads,), dtype=torch.float32, device=out.device)
    sinks = out if sink_logits is None else sink_logits
    wrap_triton(_merge)[(rows * heads,)](
        parts, lse, sinks, out, whole_lse, heads, parts.shape[0], AT_ONCE=_MERGED_AT_ONCE, VALUE_DIM=value_dim,
        VALUE_PAD=padded(value_dim), SINKS=sink_logits is not None,
    )  # fmt: skip
    if scores is not None:
        wrap_triton(_add_scores)[(rows * kv_heads, -(-slots // _SCORED_AT_ONCE))](
            logits, whole_lse, slot, count, scores, kv_heads, slots, GROUP=group, ROWS=padded_rows(group),
            BLOCK=_SCORED_AT_ONCE,
        )  # fmt: skip


def _interpreted() -> bool:
    """Whether kernels run under Triton's interpreter."""
    return not isinstance(_merge, triton.JITFunction)


def split_size(slots: int, launch: Launch) -> int:
    """Slots of one split: whole blocks, so that no block is read by two programs."""
    blocks = -(-slots // launch.block)
    return -(-blocks // launch.splits) * launch.block


def padded(dims: int) -> int:
    """So many dimensions as tiles have: a power of two, and enough for a matrix product."""
    return max(_LEAST_DIMS, 1 << (dims - 1).bit_length())


def padded_rows(group: int) -> int:
    """So many rows as the tile of a query group has."""
    return max(_LEAST_ROWS, 1 << (group - 1).bit_length())
