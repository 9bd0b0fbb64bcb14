"""Decode attention on CPU by our C++ kernels: one for slots in the model's dtype, one for slots of fewer bits. A layer
whose KV heads have several caches is served by one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xkv_fx.lowering.kernels import attention_coded_cpu, attention_heads_cpu
from xkv_fx.lowering.kernels.attention import ATTENTION, DECODE, misfit
from xkv_fx.lowering.kernels.kernel import Call, Kernel
from xkv_fx.passes.tools.graph import call_instead, emit
from xkv_fx.runtime.kernels import decode_cpu
from xkv_fx.runtime.kernels.build_cpu import DTYPES, STEP

SERVED: dict[Any, torch._ops.OpOverload] = {
    DECODE: torch.ops.xkv.decode_attention_cpu.default,
    **attention_coded_cpu.SERVED,
}
"""By which operator each op is served, one cache alone."""


def _accepts(call: Call) -> str | None:
    if call.node.target in attention_coded_cpu.SERVED:
        return attention_coded_cpu.obstacle(call.values)
    if call.node.target is not DECODE:
        return "eviction by score"
    given = call.values
    unfit = misfit(given, DTYPES)
    if unfit is not None:
        return unfit
    k_cache, v_cache, mask = given["k_cache"], given["v_cache"], given["mask"]
    if k_cache.shape[3] % STEP or v_cache.shape[3] % STEP:
        return f"head sizes {k_cache.shape[3]} and {v_cache.shape[3]} are not multiples of {STEP}"
    if mask.dtype != k_cache.dtype or mask.shape[1] not in (1, k_cache.shape[1]):
        return "biased attention"
    return None


def _use(calls: Sequence[Call]) -> None:
    for call in calls:
        if call.node.target in attention_coded_cpu.SERVED:
            attention_coded_cpu.build(call)
            continue
        q, k_cache, v_cache = (call.values[name] for name in ("q", "k_cache", "v_cache"))
        decode_cpu.build(q.dtype, q.shape[1] // k_cache.shape[1], k_cache.shape[3], v_cache.shape[3])
    layer = attention_heads_cpu.layer_of(calls)
    if layer is not None:
        attention_heads_cpu.use(layer)
        return
    for call in calls:
        given, graph = call.given, call.node.graph
        for name in ("sink_logits", "key_mean"):
            if given.get(name) is not None:
                with graph.inserting_before(call.node):
                    given[name] = emit(graph, torch.ops.aten.to.dtype, given[name], torch.float32)
        call_instead(call.node, SERVED[call.node.target], given)


KERNEL = Kernel(
    ATTENTION,
    "CPU kernel",
    _accepts,
    _use,
    device="cpu",
    together=lambda call: attention_heads_cpu.joined_in(call.node),
)
