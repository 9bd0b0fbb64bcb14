"""Linear layers of a decode step on CPU by our own kernel, `linear_cpu.cpp`, without repacking the weights.

In bfloat16 torch's own matrix product of a few rows takes several times as long as reading the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from xkv_fx.runtime.kernels.build_cpu import TAGS, build_kernel, library

MOST_ROWS = 64
"""Above this many rows a matrix product is bound by arithmetic."""

library.define("linear_cpu(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor", tags=TAGS)


@functools.cache
def build(dtype: torch.dtype, int8: bool = False) -> None:
    """Make `torch.ops.xkv.linear_cpu` serve tensors of that dtype, with weights of the same dtype or, if asked, int8.

    It applies several layers to one input: it takes `x [..., depth]`, contiguous weights `[width, depth]` and as many
    contiguous biases `[width]`, or none, and returns the outputs `[rows, width]`, the leading dimensions as one, one
    after another in a flat tensor. `depth` is a multiple of `build_cpu.STEP`. int8 weights are multiplied as plain
    numbers: the caller applies the scales.

    Args:
        dtype: one of `build_cpu.DTYPES`.
        int8: for weights in int8.

    Raises:
        BackendError: there is no C++ compiler, or it refuses the kernel.
    """
    build_kernel("linear_cpu.cpp", "xkv_linear", dtype, int8=int8)


def _fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1] * sum(weight.shape[0] for weight in weights))


torch.library.register_fake("xkv::linear_cpu", _fake, lib=library)
