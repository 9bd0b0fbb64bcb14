"""Linear layers of a decode step on CPU by a kernel of our own, `linear_cpu.cpp`, which reads the weights as they lie.

In bfloat16 torch's own matrix product of a few rows takes several times as long as reading the weights.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from xkv_fx.runtime.kernels.build_cpu import build_kernel, library

MOST_ROWS = 64
"""Above this many rows a matrix product is bound by arithmetic."""

library.define("linear_cpu(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")


@functools.cache
def build(dtype: torch.dtype) -> None:
    """Make `torch.ops.xkv.linear_cpu` serve tensors of that dtype.

    It takes `x [..., depth]`, a contiguous `weight [width, depth]` and `bias [width]`, and returns `[rows, width]`, the
    leading dimensions as one. `depth` is a multiple of `build_cpu.STEP`.

    Args:
        dtype: one of `build_cpu.DTYPES`.

    Raises:
        BackendError: there is no C++ compiler, or it refuses the kernel.
    """
    build_kernel("linear_cpu.cpp", "xkv_linear", dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((x.numel() // x.shape[-1], weight.shape[0]))


torch.library.register_fake("xkv::linear_cpu", _fake, lib=library)
