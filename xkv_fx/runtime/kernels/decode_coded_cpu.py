"""Decode attention over slots of fewer bits on CPU by a kernel of our own, `decode_coded_cpu.cpp`, built for the shapes
and formats of a model when it is lowered. Codes are read once for the whole query group, and multiplied as they are or
widened in registers, by the instructions that the processor has."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from xkv_fx.runtime.attention import empty_output
from xkv_fx.runtime.kernels.build_cpu import TAGS, build_kernel, library
from xkv_fx.runtime.quantize import Coding

library.define(
    "decode_coded_cpu(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) k_scales, Tensor(c!) v_cache, "
    "Tensor(d!) v_scales, Tensor slot, Tensor mask, float scale, int key_bits, int value_bits, float? softcap=None, "
    "Tensor? sink_logits=None, Tensor? key_mean=None) -> Tensor",
    tags=TAGS,
)
library.define(
    "decode_coded_scored_cpu(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) k_scales, "
    "Tensor(c!) v_cache, Tensor(d!) v_scales, Tensor(e!) positions, Tensor(f!) scores, Tensor slot, Tensor mask, "
    "Tensor seen, float scale, int key_bits, int value_bits, float? softcap=None, Tensor? sink_logits=None, "
    "Tensor? key_mean=None) -> Tensor",
    tags=TAGS,
)

STEP = 8
"""Head sizes are multiples of this."""


@functools.cache
def build(
    dtype: torch.dtype,
    group: int,
    key_dim: int,
    value_dim: int,
    key_bits: int,
    value_bits: int,
    lacking: Sequence[str] = (),
) -> None:
    """Make `torch.ops.xkv.decode_coded_cpu` and `decode_coded_scored_cpu` serve tensors like these.

    They are `xkv::decode_coded` and `xkv::decode_coded_scored`, which say what the arguments are; buffers are
    contiguous, sink logits and mean keys float32.

    Args:
        dtype: one of `build_cpu.DTYPES`.
        group: query heads for each KV head.
        key_dim, value_dim: multiples of `STEP`.
        key_bits, value_bits: 8, 4, or 0 for the dtype; not both 0, which is for `decode_cpu`.
        lacking: as in `build_cpu.build_kernel`.

    Raises:
        BackendError: there is no C++ compiler, or it refuses the kernel.
        BudgetError: a size that no group of a coding divides.
    """
    codings = tuple(
        Coding.of_bits(bits, dim) if bits else None for bits, dim in ((key_bits, key_dim), (value_bits, value_dim))
    )
    build_kernel(
        "decode_coded_cpu.cpp",
        "xkv_decode_coded",
        dtype,
        group,
        key_dim,
        value_dim,
        codings=codings,
        lacking=lacking,
    )


for _name in ("decode_coded_cpu", "decode_coded_scored_cpu"):
    torch.library.register_fake(f"xkv::{_name}", empty_output, lib=library)
