"""The CPU operators as functions of C, which code that Inductor writes in C++ calls directly.

Through torch's dispatcher each call of an operator with lists of tensors would need headers that take longer to compile
than all the rest of a decode step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from xkv_fx.runtime.kernels import (  # noqa: F401  (define the operators)
    decode_coded_cpu,
    decode_cpu,
    decode_heads_cpu,
    linear_cpu,
)


@dataclasses.dataclass(frozen=True, eq=False)
class _Operator:
    """An operator as a key of Inductor's settings: it looks up like the operator, but can be written to disk; otherwise
    Inductor would cache nothing that it compiles."""

    name: str

    def _operator(self) -> Any:
        return getattr(torch.ops.xkv, self.name).default

    def __hash__(self) -> int:
        return hash(self._operator())

    def __eq__(self, other: object) -> bool:
        return other is self._operator() or (isinstance(other, _Operator) and other.name == self.name)


def _function(name: str, *arguments: str) -> str:
    return f"AOTITorchError aoti_torch_cpu_{name}({', '.join((*arguments, 'AtenTensorHandle* out'))})"


_CODED = "double", "int64_t", "int64_t", "double*", "AtenTensorHandle*", "AtenTensorHandle*"
_TENSORS = "const AtenTensorHandle*", "int64_t"
_NUMBERS = "const int64_t*", "int64_t"
_HEADS = *["AtenTensorHandle"] * 3, *_TENSORS * 3, *_NUMBERS * 2, "double", "double*", "AtenTensorHandle*", *_TENSORS
FUNCTIONS = {
    _Operator("decode_attention_cpu"): [
        _function("decode_attention_cpu", *["AtenTensorHandle"] * 7, "double", "double*", "AtenTensorHandle*")
    ],
    _Operator("decode_coded_cpu"): [_function("decode_coded_cpu", *["AtenTensorHandle"] * 9, *_CODED)],
    _Operator("decode_coded_scored_cpu"): [_function("decode_coded_scored_cpu", *["AtenTensorHandle"] * 12, *_CODED)],
    _Operator("decode_heads_cpu"): [_function("decode_heads_cpu", *_HEADS)],
    _Operator("linear_cpu"): [_function("linear_cpu", "AtenTensorHandle", *_TENSORS, *_TENSORS)],
}
"""How each is declared, for Inductor's setting `aot_inductor.custom_ops_to_c_shims`; `ops_cpu.cpp` defines them."""
