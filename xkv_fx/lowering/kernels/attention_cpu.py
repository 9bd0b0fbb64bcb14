"""Decode attention on CPU by our C++ kernels: one for slots in the model's dtype, one for slots of fewer bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xkv_fx.lowering.kernels import attention_coded_cpu
from xkv_fx.lowering.kernels.attention import ATTENTION, DECODE
from xkv_fx.lowering.kernels.kernel import Call, Kernel
from xkv_fx.passes.tools.graph import call_instead, emit
from xkv_fx.runtime.kernels import decode_cpu
from xkv_fx.runtime.kernels.build_cpu import DTYPES, STEP


def _accepts(call: Call) -> str | None:
    if call.node.target in attention_coded_cpu.SERVED:
        return attention_coded_cpu.obstacle(call.values)
    if call.node.target is not DECODE:
        return "eviction by score"
    given = call.values
    k_cache, v_cache, mask = given["k_cache"], given["v_cache"], given["mask"]
    if k_cache.dtype not in DTYPES:
        return f"dtype {k_cache.dtype}"
    if not v_cache.shape[3]:
        return "values that are the keys"
    if k_cache.shape[3] % STEP or v_cache.shape[3] % STEP:
        return f"head sizes {k_cache.shape[3]} and {v_cache.shape[3]} are not multiples of {STEP}"
    if mask.dtype != k_cache.dtype or mask.shape[1] not in (1, k_cache.shape[1]):
        return "biased attention"
    return None


def _use(calls: Sequence[Call]) -> None:
    for call in calls:
        if call.node.target in attention_coded_cpu.SERVED:
            attention_coded_cpu.use(call)
            continue
        values, given, graph = call.values, call.given, call.node.graph
        q, k_cache, v_cache = values["q"], values["k_cache"], values["v_cache"]
        decode_cpu.build(q.dtype, q.shape[1] // k_cache.shape[1], k_cache.shape[3], v_cache.shape[3])
        if given["sink_logits"] is not None:
            with graph.inserting_before(call.node):
                given["sink_logits"] = emit(graph, torch.ops.aten.to.dtype, given["sink_logits"], torch.float32)
        call_instead(call.node, torch.ops.xkv.decode_attention_cpu.default, given)


KERNEL = Kernel(ATTENTION, "CPU kernel", _accepts, _use, device="cpu")
