"""torch's CUDA kernels for prefill, where they serve and return the log-sum-exp.

Among new tokens it is flash attention, which takes KV heads that are fewer than query heads; over slots the
memory-efficient kernel, which takes a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor


def flash_applies(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `causal_by_flash` takes these, on this GPU."""
    if q.device.type != "cuda":
        return False
    grouped = q.shape[1] != k.shape[1]
    if q.shape[-1] % 8 or v.shape[-1] != q.shape[-1]:  # torch pads such head sizes before it asks its kernel
        return False
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, grouped)
    return torch.backends.cuda.can_use_flash_attention(parameters)


def causal_by_flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attention.causal_attention` of nothing but a scale."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)
    return out, lse[..., : q.shape[2]]


def bias_applies(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> bool:
    """Whether `slots_by_bias` takes these, on this GPU."""
    aligned = 8 if q.dtype.itemsize == 2 else 4  # head sizes and strides in multiples of 16 bytes
    return (
        q.device.type == "cuda"
        and mask.shape[1:3] == (1, 1)
        and torch.version.hip is None  # where the log-sum-exp has another shape
        and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and (q.dtype != torch.bfloat16 or torch.cuda.get_device_capability(q.device) >= (8, 0))
        and k.shape[-1] % aligned == 0
        and v.shape[-1] % aligned == 0
    )


def slots_by_bias(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attention.slot_attention` by a mask `[rows, 1, 1, slots]`; queries without a slot get anything.

    The kernel wants as many KV heads as query heads, so the query group is folded into the queries; it wants the rows
    of the bias aligned, and pads its log-sum-exp.
    """
    rows, heads, length, dim = q.shape
    kv_heads, slots = k.shape[1:3]
    folded = q.reshape(rows, kv_heads, -1, dim)
    queries = folded.shape[2]
    bias = torch.zeros(rows, 1, 1, slots + -slots % 16, dtype=q.dtype, device=q.device)[..., :slots]
    bias = bias.masked_fill_(~mask, float("-inf")).expand(rows, kv_heads, queries, slots)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(folded, k, v, bias, True, scale=scale)
    return out.reshape(rows, heads, length, -1), lse[..., :queries].reshape(rows, heads, length)
