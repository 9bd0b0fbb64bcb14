"""Linear layers of a few rows, and decode attention, as sums for Inductor's own loops.

An engine has no kernels of ours. Torch's kernels do not read the weights for one row, or a half-precision cache, at the
full speed of memory, nor do they share such work well among threads. So each row, and each query of a group, becomes a
sum of its own: Inductor turns the sums of a layer into one loop, which reads each weight, key and value once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xkv_fx.runtime.attention import apply_sink_logits, soft_cap, values_of, wide_dtype
from xkv_fx.runtime.ops import attend_slots, write_token

MOST = 8
"""The most rows, or queries of a group. Beyond it torch's kernels are as fast, and compiling a sum for each is slow."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`aten.linear` of `x` `[..., depth]` and `weight` `[width, depth]`; sums are float32, or float64 for float64."""
    rows = math.prod(x.shape[:-1])
    if x.device.type != "cpu" or not 1 <= rows <= MOST:
        return torch.nn.functional.linear(x, weight, bias)
    wide = wide_dtype(x)
    weights = weight.to(wide)
    sums = torch.stack([(row.to(wide) * weights).sum(-1) for row in _once(x).reshape(rows, -1).unbind()])
    if bias is not None:
        sums = sums + bias.to(wide)
    return sums.to(x.dtype).view(*x.shape[:-1], -1)


def decode_attention(
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
    """`xkv::decode_attention`."""
    write_token(k, v, k_cache, v_cache, slot)
    rows, kv_heads = k_cache.shape[:2]
    group = q.shape[1] // kv_heads
    if q.device.type != "cpu" or group > MOST:
        return attend_slots(q, k_cache, v_cache, mask, scale, softcap, sink_logits)
    if mask.shape[1] not in (1, kv_heads):  # one for each query
        mask = mask.reshape(rows, kv_heads, group, -1)
    wide = wide_dtype(q)
    keys, values = k_cache.to(wide), values_of(k_cache, v_cache).to(wide)
    queries = _once(q).reshape(rows, kv_heads, group, -1).to(wide)
    logits = torch.stack([(query[:, :, None] * keys).sum(-1) for query in queries.unbind(2)], 2)
    logits = soft_cap(logits * scale, softcap) + mask
    lse = torch.logsumexp(logits, -1, keepdim=True)
    weights = _once(torch.exp(logits - lse))
    out = torch.stack([(weight[..., None] * values).sum(2) for weight in weights.unbind(2)], 2)
    return apply_sink_logits(
        out.reshape(rows, -1, 1, values.shape[-1]).to(q.dtype), lse.reshape(rows, -1, 1), sink_logits
    )


def _once(values: Tensor) -> Tensor:
    """The same values, which Inductor computes once: it does not look through an `as_strided`. Without one it would
    compute each value again wherever a sum uses it, once for each weight or slot."""
    values = values.contiguous()
    return values.as_strided(values.shape, values.stride())


BY_SUMS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.linear.default: linear,
    torch.ops.xkv.decode_attention.default: decode_attention,
}
"""What `trace_program` puts in place of these ops of a decode graph before AOTInductor compiles it."""
