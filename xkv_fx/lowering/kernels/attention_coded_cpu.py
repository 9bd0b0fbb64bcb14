"""Decode attention over slots of fewer bits on CPU by our C++ kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xkv_fx.lowering.kernels.attention import DECODE_CODED, DECODE_CODED_SCORED, misfit
from xkv_fx.lowering.kernels.kernel import Call
from xkv_fx.runtime.kernels import decode_coded_cpu
from xkv_fx.runtime.kernels.build_cpu import DTYPES
from xkv_fx.runtime.kernels.decode_coded_cpu import STEP

SERVED: dict[Any, torch._ops.OpOverload] = {
    DECODE_CODED: torch.ops.xkv.decode_coded_cpu.default,
    DECODE_CODED_SCORED: torch.ops.xkv.decode_coded_scored_cpu.default,
}
"""By which operator each op is served."""


def obstacle(given: Mapping[str, Any]) -> str | None:
    """Why the kernel does not serve a call with these arguments; None where it does."""
    unfit = misfit(given, DTYPES)
    if unfit is not None:
        return unfit
    q, k, v, mask = given["q"], given["k"], given["v"], given["mask"]
    if q.shape[3] % STEP or v.shape[3] % STEP:
        return f"head sizes {q.shape[3]} and {v.shape[3]} are not multiples of {STEP}"
    if mask.dtype != q.dtype or mask.shape[1] not in (1, k.shape[1]):
        return "biased attention"
    if 1 in (given["k_scales"].shape[4], given["v_scales"].shape[4]):
        return "slots of fp8"
    return None


def build(call: Call) -> None:
    """Build the kernel for the call's shapes and formats."""
    values = call.values
    q, k, v = values["q"], values["k"], values["v"]
    group = q.shape[1] // k.shape[1]
    decode_coded_cpu.build(q.dtype, group, q.shape[3], v.shape[3], values["key_bits"], values["value_bits"])
