"""The CPU operators as functions of C: found by their operators, and kept by Inductor's cache on disk."""

from __future__ import annotations

import pickle

import torch

from xkv_fx.runtime import ops  # noqa: F401  (registers the ops)
from xkv_fx.runtime.kernels.functions_cpu import FUNCTIONS

OPERATORS = [
    getattr(torch.ops.xkv, name).default
    for name in ("decode_attention_cpu", "decode_coded_cpu", "decode_heads_cpu", "linear_cpu")
]


def test_each_operator_is_found() -> None:
    found: dict[object, list[str]] = {**FUNCTIONS}
    for operator in OPERATORS:
        (declared,) = found[operator]
        assert f"aoti_torch_cpu_{operator.name().split('::')[1]}(" in declared
    assert torch.ops.xkv.attention.default not in found


def test_settings_are_written_alike_each_time_and_read_again() -> None:
    written = pickle.dumps(FUNCTIONS)
    assert pickle.dumps(pickle.loads(written)) == written
    assert pickle.loads(written) == FUNCTIONS
