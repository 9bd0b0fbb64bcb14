"""Decode attention on CPU by a kernel of our own, `decode_cpu.cpp`, built for the shapes of a model when it is lowered.

torch's paths read kept K/V at well under half of the memory's speed for one query; this one reads each kept K/V once
for the whole query group.
"""

from __future__ import annotations

import functools

import torch

from xkv_fx.runtime.attention import empty_output
from xkv_fx.runtime.kernels.build_cpu import TAGS, build_kernel, library

library.define(
    "decode_attention_cpu(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot, "
    "Tensor mask, float scale, float? softcap=None, Tensor? sink_logits=None) -> Tensor",
    tags=TAGS,
)


@functools.cache
def build(dtype: torch.dtype, group: int, key_dim: int, value_dim: int) -> None:
    """Make `torch.ops.xkv.decode_attention_cpu` serve tensors like these.

    It is `xkv::decode_attention`, which says what the arguments are; K/V buffers are contiguous, sink logits float32.

    Args:
        dtype: one of `build_cpu.DTYPES`.
        group: query heads for each KV head.
        key_dim, value_dim: multiples of `build_cpu.STEP`.

    Raises:
        BackendError: there is no C++ compiler, or it refuses the kernel.
    """
    build_kernel("decode_cpu.cpp", "xkv_decode", dtype, group, key_dim, value_dim)


torch.library.register_fake("xkv::decode_attention_cpu", empty_output, lib=library)
