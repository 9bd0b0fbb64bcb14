"""Decode attention over slots of fewer bits on CPU by a kernel of our own, `decode_coded_cpu.cpp`, built for the shapes
and formats of a model when it is lowered. Codes are read once for the whole query group, and widened in registers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from xkv_fx.runtime.kernels.build_cpu import TAGS, build_kernel, library
from xkv_fx.runtime.quantize import Coding

library.define(
    "decode_coded_cpu(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) k_scales, Tensor(c!) v_cache, "
    "Tensor(d!) v_scales, Tensor slot, Tensor mask, float scale, int key_bits, int value_bits, float? softcap=None, "
    "Tensor? sink_logits=None, Tensor? key_mean=None) -> Tensor",
    tags=TAGS,
)


@functools.cache
def build(dtype: torch.dtype, group: int, key_dim: int, value_dim: int, key_bits: int, value_bits: int) -> None:
    """Make `torch.ops.xkv.decode_coded_cpu` serve tensors like these.

    It is `xkv::decode_coded`, which says what the arguments are; buffers are contiguous, sink logits float32.

    Args:
        dtype: one of `build_cpu.DTYPES`.
        group: query heads for each KV head.
        key_dim, value_dim: multiples of `build_cpu.STEP`.
        key_bits, value_bits: 8, 4, or 0 for the dtype; not both 0, which is for `decode_cpu`.

    Raises:
        BackendError: there is no C++ compiler, or it refuses the kernel.
        BudgetError: a size that no group of a coding divides.
    """
    codings = tuple(
        Coding.of_bits(bits, dim) if bits else None for bits, dim in ((key_bits, key_dim), (value_bits, value_dim))
    )
    build_kernel("decode_coded_cpu.cpp", "xkv_decode_coded", dtype, group, key_dim, value_dim, codings=codings)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[-1]))


torch.library.register_fake("xkv::decode_coded_cpu", _fake, lib=library)
