"""Decode attention on GPU over slots of fewer bits, by a Triton kernel.

As `decode_triton`, whose splits, merging and scores it shares: one pass reads the codes of each kept slot once for all
queries of its KV head, and widens them in registers. The same launch encodes the new token and writes its codes. What a
token's slot will hold is computed from the arguments and never read back, so that no program waits for the one that
writes.

A vector is worked on in two halves, since a byte of int4 holds an element of each. Whole numbers are centred, so that
every code is exact in the model's dtype; products with them are of that dtype, and scales and zeros, one pair for each
half of head sizes up to 128, are applied to the sums. Codes are of rotated vectors: queries are rotated first, outputs
last, by products with the signs of a Hadamard matrix, which are made in registers.

Importing this module imports triton; it registers two `torch.library.triton_op`s.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from xkv_fx.runtime.kernels.decode_triton import (
    Launch,
    cap,
    decode,
    mask_of,
    masked,
    next_softmax,
    padded,
    store_lse,
    with_sink,
)
from xkv_fx.runtime.quantize import Coding

_LARGEST_HALF = tl.constexpr(65504.0)
_LARGEST_FLOAT8 = tl.constexpr(448.0)
_FLOAT8_AS_HALF = tl.constexpr(256.0)  # what the bits of a float of 8 bits, read as float16, are smaller by
_TO_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to whole numbers, halves to even ones
_TO_512THS = tl.constexpr(16384.0)  # 2**14, in the same way
_TURNED = tl.constexpr(32)  # columns that are rotated at once, for whose signs there are registers


def layouts(buffers: tuple[Tensor, ...], bits: tuple[int, int], dims: tuple[int, int]) -> dict[str, Any]:
    """What the kernel is compiled for, from buffers `k_cache, k_scales, v_cache, v_scales`, and bits and sizes of keys
    and of values."""
    made: dict[str, Any] = {}
    for name, scales, of, dim in zip(("KEY", "VALUE"), buffers[1::2], bits, dims, strict=True):
        coding = Coding.of_bits(of, dim, floats=scales.shape[-1] == 1) if of else None
        block = dim & -dim
        made |= {
            f"{name}_DIM": dim,
            f"{name}_BITS": of,
            f"{name}_FLOATS": coding is not None and coding.floats,
            f"{name}_SPAN": dim if coding is None else coding.group,
            f"{name}_LOG": 0 if coding is None else block.bit_length() - 1,
            f"{name}_ROOT": math.sqrt(block),
            f"{name}_PAD": padded(dim),
            f"{name}_HALF": padded(dim // 2),
        }
    return made


def precision(dtype: torch.dtype) -> str:
    """Of the products that rotate. In tf32, signs and half-precision queries are exact, and outputs are rounded to as
    many bits as float16 has."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def _signs(i, e, DIM: tl.constexpr, LOG: tl.constexpr):
    """Entries of the Hadamard matrices of `quantize.rotate`, times their root: 1 and -1, 0 between blocks."""
    shared = i & e & ((1 << LOG) - 1)
    shared ^= shared >> 8
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    same = ((i >> LOG) == (e >> LOG)) & (i < DIM) & (e < DIM)
    return tl.where(same, 1.0 - 2.0 * (shared & 1).to(tl.float32), 0.0)


@triton.jit
def _rotated(x, ROOT: tl.constexpr, LOG: tl.constexpr, PAD: tl.constexpr):
    """A vector float32 `[PAD]` rotated, the additions in the order of `quantize.rotate`."""
    d = tl.arange(0, PAD)
    for power in tl.static_range(LOG):
        other = tl.gather(x, d ^ (1 << power), 0)
        x = tl.where((d & (1 << power)) == 0, x + other, other - x)
    return tl.div_rn(x, tl.full([PAD], ROOT, tl.float32))


@triton.jit
def _float8_of(x):
    """The bits of the floats of 8 bits (E4M3) that are nearest to numbers of at most 448."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    tiny = (tl.abs(x) + _TO_512THS).to(tl.int32, bitcast=True) & 15
    code = tl.where(tl.abs(x) < 0.015625, tiny, normal)
    return tl.where(x != x, 127, code | ((bits >> 24) & 128))


@triton.jit
def _half_of_float8(codes):
    """Floats of 8 bits, divided by 256, as float16: their exponents and mantissas are the same bits, shifted."""
    codes = codes.to(tl.uint16)
    return (((codes & 127) << 7) | ((codes & 128) << 8)).to(tl.float16, bitcast=True)


@triton.jit
def _divisor(scale):
    wide = scale.to(tl.float32)
    return tl.where(wide > 0.0, wide, 1.0)


@triton.jit
def _store_token(
    x, codes, scales,
    DIM: tl.constexpr, BITS: tl.constexpr, FLOATS: tl.constexpr, SPAN: tl.constexpr, LOG: tl.constexpr,
    ROOT: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Writes a vector's codes and scales, to the bit those of `quantize.Coding.encode`; returns what they stand for,
    rotated back. A NaN makes the scale and the zero of its group NaN.

    Args:
        x: float32 `[PAD]`, 0 behind the vector.
        codes, scales: where the slot's are.
    """
    d = tl.arange(0, PAD)
    x = _rotated(x, ROOT, LOG, PAD)
    if FLOATS:
        bad = tl.max((x != x).to(tl.int32), 0) > 0
        most = tl.where(bad, float("nan"), tl.max(tl.where(x != x, 0.0, tl.abs(x)), 0))
        scale = tl.div_rn(most, tl.full((), _LARGEST_FLOAT8, tl.float32))
        scale = tl.where(scale > _LARGEST_HALF, _LARGEST_HALF, scale).to(tl.float16)
        small = tl.div_rn(x, tl.zeros([PAD], tl.float32) + _divisor(scale))
        small = tl.where(small > _LARGEST_FLOAT8, _LARGEST_FLOAT8, small)
        small = tl.where(small < -_LARGEST_FLOAT8, -_LARGEST_FLOAT8, small)
        code = _float8_of(small)
        tl.store(codes + d, code.to(tl.uint8), mask=d < DIM)
        tl.store(scales, scale)
        restored = _half_of_float8(code).to(tl.float32) * _FLOAT8_AS_HALF * scale.to(tl.float32)
    else:
        steps: tl.constexpr = (1 << BITS) - 1
        zeros = tl.zeros([PAD], tl.float32)
        widths = tl.zeros([PAD], tl.float32)
        for group in tl.static_range(DIM // SPAN):
            inside = (d >= group * SPAN) & (d < (group + 1) * SPAN)
            bad = tl.max((inside & (x != x)).to(tl.int32), 0) > 0
            low = tl.min(tl.where(inside & (x == x), x, float("inf")), 0)
            high = tl.max(tl.where(inside & (x == x), x, float("-inf")), 0)
            low = tl.minimum(tl.maximum(low, -_LARGEST_HALF), _LARGEST_HALF)
            zero = tl.where(bad, float("nan"), low).to(tl.float16)
            width = tl.div_rn(high - zero.to(tl.float32), tl.full((), steps, tl.float32))
            width = tl.minimum(tl.maximum(width, 0.0), _LARGEST_HALF)
            scale = tl.where(bad, float("nan"), width).to(tl.float16)
            tl.store(scales + 2 * group, scale)
            tl.store(scales + 2 * group + 1, zero)
            zeros = tl.where(inside, zero.to(tl.float32), zeros)
            widths = tl.where(inside, scale.to(tl.float32), widths)
        code = tl.div_rn(x - zeros, tl.where(widths > 0.0, widths, 1.0))
        code = tl.where(code > 0.0, tl.where(code > steps, steps * 1.0, code), 0.0)
        code = (code + _TO_WHOLE) - _TO_WHOLE
        restored = tl.where(d < DIM, zeros + widths * code, 0.0)
        code = code.to(tl.int32)
        if BITS == 4:
            code |= tl.gather(code, tl.where(d < DIM // 2, d + DIM // 2, d), 0) << 4
        tl.store(codes + d, code.to(tl.uint8), mask=d < DIM * BITS // 8)
    return _rotated(restored, ROOT, LOG, PAD)


@triton.jit
def _in_dtype(x, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """Numbers float32 rounded to a dtype. Triton's interpreter cuts off what bfloat16 does not hold, so that under it
    the bits are rounded here."""
    if WIDEN:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype).to(tl.float32)


@triton.jit
def _widened(codes, FLOATS: tl.constexpr, TO: tl.constexpr):
    """Bytes as numbers that are exact in every dtype of a model: whole ones less 128, floats divided by 256."""
    if FLOATS:
        return _half_of_float8(codes).to(TO)
    return (codes ^ 128).to(tl.int8, bitcast=True).to(TO)


@triton.jit
def _halves(
    cache, n, valid,
    DIM: tl.constexpr, BITS: tl.constexpr, FLOATS: tl.constexpr, HALF: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Both halves `[BLOCK, HALF]` of what some slots hold: numbers, or centred codes."""
    j = tl.arange(0, HALF)
    inside = valid[:, None] & (j < DIM // 2)[None, :]
    if BITS == 4:
        both = tl.load(cache + n.to(tl.int64)[:, None] * (DIM // 2) + j[None, :], mask=inside, other=0)
        first = ((both & 15).to(tl.int8, bitcast=True) - 8).to(TO)
        second = ((both >> 4).to(tl.int8, bitcast=True) - 8).to(TO)
    else:
        place = cache + n.to(tl.int64)[:, None] * DIM + j[None, :]
        first = tl.load(place, mask=inside, other=0)
        second = tl.load(place + DIM // 2, mask=inside, other=0)
        if BITS == 8:
            first = _widened(first, FLOATS, TO)
            second = _widened(second, FLOATS, TO)
        else:
            first = first.to(TO)
            second = second.to(TO)
    return first, second


@triton.jit
def _scale_of(scales, n, valid, group, GROUPS: tl.constexpr, BITS: tl.constexpr, FLOATS: tl.constexpr):
    """Of one group of some slots: what centred codes are multiplied by, and what is added then, float32 `[BLOCK]`."""
    if FLOATS:
        scale = tl.load(scales + n, mask=valid, other=0.0).to(tl.float32) * _FLOAT8_AS_HALF
        zero = tl.zeros(scale.shape, tl.float32)
    else:
        words = scales.to(tl.pointer_type(tl.int32), bitcast=True)  # of both: one load, which can be asynchronous
        both = tl.load(words + n.to(tl.int64) * GROUPS + group, mask=valid, other=0)
        scale = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        zero = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) + scale * (1 << (BITS - 1))
    return scale, zero


@triton.jit
def _restored(
    half, scales, n, valid, start,
    GROUPS: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The numbers that a half's codes stand for, where it has more than one group."""
    group_of = (start + tl.arange(0, HALF)) // SPAN
    width = tl.zeros(half.shape, tl.float32)
    level = tl.zeros(half.shape, tl.float32)
    for group in tl.static_range(GROUPS):
        scale, zero = _scale_of(scales, n, valid, group, GROUPS, BITS, False)
        mine = (group_of == group)[None, :]
        width = tl.where(mine, scale[:, None], width)
        level = tl.where(mine, zero[:, None], level)
    return (level + width * half.to(tl.float32)).to(half.dtype)


@triton.jit
def _weighed(weight, half, scale, zero):
    """Weights `[ROWS, BLOCK]` times a half's values: the sum of codes times scales, and that of zeros. Scales are made
    relative to the largest, since products of small weights and small scales might vanish in float16."""
    most = tl.max(scale, 0)
    relative = weight * (scale / tl.where(most > 0.0, most, 1.0))[None, :]
    summed = tl.dot(relative.to(half.dtype), half, input_precision="ieee") * most
    return summed + tl.sum(weight * zero[None, :], 1)[:, None]


@triton.jit
def _attend_coded(
    q, k, v, k_cache, k_scales, v_cache, v_scales, slot, count, mask, positions, seen, sink_logits, key_mean, out, lse,
    logits, scale, softcap, kv_heads, slots, split_size,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_BITS: tl.constexpr, KEY_FLOATS: tl.constexpr, KEY_SPAN: tl.constexpr,
    KEY_LOG: tl.constexpr, KEY_ROOT: tl.constexpr, KEY_PAD: tl.constexpr, KEY_HALF: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_FLOATS: tl.constexpr, VALUE_SPAN: tl.constexpr,
    VALUE_LOG: tl.constexpr, VALUE_ROOT: tl.constexpr, VALUE_PAD: tl.constexpr, VALUE_HALF: tl.constexpr,
    MASK_HEADS: tl.constexpr,  # 1, or KV heads, or query heads when BIASED
    BIASED: tl.constexpr, SCORED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, CENTRED: tl.constexpr,
    ONE_SPLIT: tl.constexpr,  # one split: `out` is the result, not a part of it
    WIDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the slots of one row and KV head, for all of its queries."""
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = pair // kv_heads
    head = pair % kv_heads
    g = tl.arange(0, ROWS)
    d = tl.arange(0, KEY_PAD)
    j = tl.arange(0, KEY_HALF)
    i = tl.arange(0, VALUE_HALF)
    is_query = g < GROUP
    key_groups: tl.constexpr = KEY_DIM // KEY_SPAN
    value_groups: tl.constexpr = VALUE_DIM // VALUE_SPAN
    to: tl.constexpr = tl.float32 if WIDEN else q.dtype.element_ty

    start = split * split_size
    stop = tl.minimum(start + split_size, tl.load(count + row)).to(tl.int32)
    taken = tl.load(slot + (pair if SCORED else row))
    token = tl.load(seen + row)
    mine = (taken >= start) & (taken < start + split_size)
    k_cache += pair * slots * (KEY_DIM * KEY_BITS // 8 if KEY_BITS else KEY_DIM)
    v_cache += pair * slots * (VALUE_DIM * VALUE_BITS // 8 if VALUE_BITS else VALUE_DIM)
    k_scales += pair * slots * key_groups * (1 if KEY_FLOATS else 2)
    v_scales += pair * slots * value_groups * (1 if VALUE_FLOATS else 2)
    positions += pair * slots
    logits += pair * GROUP * slots
    mask = mask_of(mask, row, head, slots, GROUP, MASK_HEADS, BIASED)

    # Queries, rotated like the keys; and what the mean key adds to each of their logits.
    place = q + (pair * GROUP + g)[:, None] * KEY_DIM
    query = tl.load(place + d[None, :], mask=is_query[:, None] & (d < KEY_DIM)[None, :], other=0.0).to(tl.float32)
    if KEY_BITS:
        first_query = tl.zeros([ROWS, KEY_HALF], tl.float32)
        second_query = tl.zeros([ROWS, KEY_HALF], tl.float32)
        inside = (j < KEY_DIM // 2)[None, :]
        for begin in range(0, KEY_DIM, _TURNED):
            c = begin + tl.arange(0, _TURNED)
            part = tl.load(place + c[None, :], mask=is_query[:, None] & (c < KEY_DIM)[None, :], other=0.0)
            part = part.to(tl.float32)
            signs = tl.where(inside, _signs(c[:, None], j[None, :], KEY_DIM, KEY_LOG), 0.0)
            first_query = tl.dot(part, signs, first_query, input_precision=PRECISION)
            signs = tl.where(inside, _signs(c[:, None], j[None, :] + KEY_DIM // 2, KEY_DIM, KEY_LOG), 0.0)
            second_query = tl.dot(part, signs, second_query, input_precision=PRECISION)
        first_query /= KEY_ROOT
        second_query /= KEY_ROOT
    else:
        inside = is_query[:, None] & (j < KEY_DIM // 2)[None, :]
        first_query = tl.load(place + j[None, :], mask=inside, other=0.0)
        second_query = tl.load(place + j[None, :] + KEY_DIM // 2, mask=inside, other=0.0)
    first_query = first_query.to(q.dtype.element_ty).to(to)
    second_query = second_query.to(q.dtype.element_ty).to(to)
    first_sum = tl.sum(first_query.to(tl.float32), 1)
    second_sum = tl.sum(second_query.to(tl.float32), 1)
    by_mean = tl.zeros([ROWS], tl.float32)
    if CENTRED:
        mean = tl.load(key_mean + head * KEY_DIM + d, mask=d < KEY_DIM, other=0.0)
        by_mean = tl.sum(query * mean[None, :], 1)

    # The new token: the split that owns its slot writes it, and starts its running softmax with what was written.
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    own = tl.zeros([ROWS], tl.float32)  # the weight of the new token
    if VALUE_BITS:
        new_value = tl.zeros([VALUE_PAD], tl.float32)
    if mine:
        key = tl.load(k + pair * KEY_DIM + d, mask=d < KEY_DIM, other=0.0)
        if CENTRED:
            key = _in_dtype(key.to(tl.float32) - _in_dtype(mean, key.dtype, WIDEN), key.dtype, WIDEN)
        if KEY_BITS:
            key = _store_token(
                key.to(tl.float32), k_cache + taken * (KEY_DIM * KEY_BITS // 8),
                k_scales + taken * key_groups * (1 if KEY_FLOATS else 2), KEY_DIM, KEY_BITS, KEY_FLOATS, KEY_SPAN,
                KEY_LOG, KEY_ROOT, KEY_PAD,
            )  # fmt: skip
        else:
            tl.store(k_cache + taken * KEY_DIM + d, key.to(k_cache.dtype.element_ty), mask=d < KEY_DIM)
        e = tl.arange(0, VALUE_PAD)
        value = tl.load(v + pair * VALUE_DIM + e, mask=e < VALUE_DIM, other=0.0)
        if VALUE_BITS:
            new_value = _store_token(
                value.to(tl.float32), v_cache + taken * (VALUE_DIM * VALUE_BITS // 8),
                v_scales + taken * value_groups * (1 if VALUE_FLOATS else 2), VALUE_DIM, VALUE_BITS, VALUE_FLOATS,
                VALUE_SPAN, VALUE_LOG, VALUE_ROOT, VALUE_PAD,
            )  # fmt: skip
        else:
            tl.store(v_cache + taken * VALUE_DIM + e, value, mask=e < VALUE_DIM)
        maximum = (tl.sum(query * key.to(tl.float32)[None, :], 1) + by_mean) * scale
        if CAPPED:
            maximum = cap(maximum, softcap)
        maximum += tl.load(mask + (g * slots if BIASED else g * 0) + taken, mask=is_query, other=0.0).to(tl.float32)
        own = tl.where(maximum != float("-inf"), 1.0, 0.0)
        if SCORED:
            tl.store(logits + g * slots + taken, maximum, mask=is_query)
            tl.store(positions + taken, token.to(tl.int32))
    total = own
    first_values = tl.zeros([ROWS, VALUE_HALF], tl.float32)
    second_values = tl.zeros([ROWS, VALUE_HALF], tl.float32)

    for begin in range(start, stop, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        valid = (n < stop) & (n != taken)
        first, second = _halves(k_cache, n, valid, KEY_DIM, KEY_BITS, KEY_FLOATS, KEY_HALF, to)
        if KEY_BITS and key_groups > 2:
            first = _restored(first, k_scales, n, valid, 0, key_groups, KEY_BITS, KEY_SPAN, KEY_HALF)
            second = _restored(second, k_scales, n, valid, KEY_DIM // 2, key_groups, KEY_BITS, KEY_SPAN, KEY_HALF)
        x = tl.dot(first_query, tl.trans(first), input_precision="ieee")
        y = tl.dot(second_query, tl.trans(second), input_precision="ieee")
        if KEY_BITS and key_groups <= 2:
            width, level = _scale_of(k_scales, n, valid, 0, key_groups, KEY_BITS, KEY_FLOATS)
            x = x * width[None, :] + first_sum[:, None] * level[None, :]
            if key_groups == 2:
                width, level = _scale_of(k_scales, n, valid, 1, key_groups, KEY_BITS, KEY_FLOATS)
            y = y * width[None, :] + second_sum[:, None] * level[None, :]
        x = (x + y + by_mean[:, None]) * scale
        x = masked(x, mask, logits, g, n, is_query, valid, softcap, slots, BIASED, SCORED, CAPPED)
        weight, shrink, maximum, total = next_softmax(x, maximum, total)
        own = own * shrink
        first, second = _halves(v_cache, n, valid, VALUE_DIM, VALUE_BITS, VALUE_FLOATS, VALUE_HALF, to)
        if VALUE_BITS and value_groups <= 2:
            width, level = _scale_of(v_scales, n, valid, 0, value_groups, VALUE_BITS, VALUE_FLOATS)
            x = _weighed(weight, first, width, level)
            if value_groups == 2:
                width, level = _scale_of(v_scales, n, valid, 1, value_groups, VALUE_BITS, VALUE_FLOATS)
            y = _weighed(weight, second, width, level)
        else:
            if VALUE_BITS:
                first = _restored(first, v_scales, n, valid, 0, value_groups, VALUE_BITS, VALUE_SPAN, VALUE_HALF)
                second = _restored(
                    second, v_scales, n, valid, VALUE_DIM // 2, value_groups, VALUE_BITS, VALUE_SPAN, VALUE_HALF
                )
            x = tl.dot(weight.to(q.dtype.element_ty).to(to), first, input_precision="ieee")
            y = tl.dot(weight.to(q.dtype.element_ty).to(to), second, input_precision="ieee")
        first_values = first_values * shrink[:, None] + x
        second_values = second_values * shrink[:, None] + y

    if ONE_SPLIT:
        if SINKS:
            total, shrink = with_sink(sink_logits, head, g, is_query, maximum, total, GROUP)
            own = own * shrink
            first_values = first_values * shrink[:, None]
            second_values = second_values * shrink[:, None]
    else:
        store_lse(lse, split, pair, g, is_query, maximum, total, GROUP)
        out += split.to(tl.int64) * tl.num_programs(0) * GROUP * VALUE_DIM
    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    place = out + (pair * GROUP + g)[:, None] * VALUE_DIM
    if VALUE_BITS:
        inside = (i < VALUE_DIM // 2)[:, None]
        for begin in range(0, VALUE_DIM, _TURNED):
            c = begin + tl.arange(0, _TURNED)
            signs = tl.where(inside, _signs(i[:, None], c[None, :], VALUE_DIM, VALUE_LOG), 0.0)
            values = tl.dot(first_values, signs, input_precision=PRECISION)
            signs = tl.where(inside, _signs(i[:, None] + VALUE_DIM // 2, c[None, :], VALUE_DIM, VALUE_LOG), 0.0)
            values = tl.dot(second_values, signs, values, input_precision=PRECISION) / VALUE_ROOT
            new = tl.gather(new_value, tl.minimum(c, VALUE_PAD - 1), 0)
            values = (values + own[:, None] * new[None, :]) / divisor
            written = is_query[:, None] & (c < VALUE_DIM)[None, :]
            tl.store(place + c[None, :], values.to(out.dtype.element_ty), mask=written)
    else:
        inside = is_query[:, None] & (i < VALUE_DIM // 2)[None, :]
        here = (i < VALUE_DIM // 2) & mine
        first = tl.load(v + pair * VALUE_DIM + i, mask=here, other=0.0).to(tl.float32)
        second = tl.load(v + pair * VALUE_DIM + VALUE_DIM // 2 + i, mask=here, other=0.0).to(tl.float32)
        first_values = (first_values + own[:, None] * first[None, :]) / divisor
        second_values = (second_values + own[:, None] * second[None, :]) / divisor
        tl.store(place + i[None, :], first_values.to(out.dtype.element_ty), mask=inside)
        tl.store(place + i[None, :] + VALUE_DIM // 2, second_values.to(out.dtype.element_ty), mask=inside)


@triton_op("xkv::decode_coded_triton", mutates_args=("k_cache", "k_scales", "v_cache", "v_scales"))
def decode_coded_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    k_scales: Tensor,
    v_cache: Tensor,
    v_scales: Tensor,
    slot: Tensor,
    mask: Tensor,
    count: Tensor,
    scale: float,
    key_bits: int,
    value_bits: int,
    softcap: float | None,
    sink_logits: Tensor | None,
    key_mean: Tensor | None,
    splits: int,
    block: int,
    warps: int,
    stages: int,
) -> Tensor:
    """As `xkv::decode_coded`, which says what the other arguments are.

    Args:
        count, splits, block, warps, stages: as in `xkv::decode_attention_triton`.
    """
    launch, buffers = Launch(splits, block, warps, stages), (k_cache, k_scales, v_cache, v_scales)
    bits = key_bits, value_bits
    return _decode(q, k, v, buffers, slot, mask, count, scale, bits, softcap, sink_logits, key_mean, launch)


@triton_op(
    "xkv::decode_coded_scored_triton",
    mutates_args=("k_cache", "k_scales", "v_cache", "v_scales", "positions", "scores"),
)
def decode_coded_scored_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    k_scales: Tensor,
    v_cache: Tensor,
    v_scales: Tensor,
    positions: Tensor,
    scores: Tensor,
    slot: Tensor,
    mask: Tensor,
    count: Tensor,
    seen: Tensor,
    scale: float,
    key_bits: int,
    value_bits: int,
    softcap: float | None,
    sink_logits: Tensor | None,
    key_mean: Tensor | None,
    splits: int,
    block: int,
    warps: int,
    stages: int,
) -> Tensor:
    """As `xkv::decode_coded_scored`, which says what the other arguments are; `count`, `splits` and so on as in
    `decode_coded_triton`."""
    launch, buffers = Launch(splits, block, warps, stages), (k_cache, k_scales, v_cache, v_scales)
    bits, scored = (key_bits, value_bits), (positions, scores, seen)
    return _decode(q, k, v, buffers, slot, mask, count, scale, bits, softcap, sink_logits, key_mean, launch, scored)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buffers: tuple[Tensor, Tensor, Tensor, Tensor],
    slot: Tensor,
    mask: Tensor,
    count: Tensor,
    scale: float,
    bits: tuple[int, int],
    softcap: float | None,
    sink_logits: Tensor | None,
    key_mean: Tensor | None,
    launch: Launch,
    scored: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Both ops."""
    own = {
        "key_mean": q if key_mean is None else key_mean,
        "CENTRED": key_mean is not None,
        "PRECISION": precision(q.dtype),
        **layouts(buffers, bits, (k.shape[3], v.shape[3])),
    }
    named = dict(zip(("k_cache", "k_scales", "v_cache", "v_scales"), buffers, strict=True))
    return decode(
        wrap_triton(_attend_coded), q, k, v, named, slot, mask, count, scale, softcap, sink_logits, launch, scored, own
    )
