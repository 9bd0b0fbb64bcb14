"""Decode attention on GPU by our Triton kernels, under eviction by score too: one for slots in the model's dtype, one
for slots of fewer bits."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from xkv_fx.errors import BackendError
from xkv_fx.lowering.kernels.attention import (
    ATTENTION,
    BUFFERS,
    DECODE,
    DECODE_CODED,
    DECODE_CODED_SCORED,
    DECODE_SCORED,
    misfit,
)
from xkv_fx.lowering.kernels.kernel import Call, Kernel
from xkv_fx.passes.tools.graph import call_instead, emit
from xkv_fx.passes.tools.inline import inline

SERVED: dict[Any, str] = {
    DECODE: "decode_attention_triton",
    DECODE_SCORED: "decode_scored_triton",
    DECODE_CODED: "decode_coded_triton",
    DECODE_CODED_SCORED: "decode_coded_scored_triton",
}
"""By which operator each op is served; importing a kernel registers its own."""

_log = logging.getLogger(__name__)
_PROCESSORS = 108  # assumed for a GPU that is not there to be asked, as when only fake tensors stand for it


def _accepts(call: Call) -> str | None:
    """Why not is also logged.

    Raises:
        BackendError: Triton is missing.
    """
    why = obstacle(_kernel(), call.values)
    if why is not None:
        _log.warning("%s is not served by the Triton kernel (%s); torch ops take its place", call.node.name, why)
    return why


def _use(calls: Sequence[Call]) -> None:
    for call in calls:
        given, graph = call.given, call.node.graph
        launch, count = _launch(_kernel(), call.values), _count(call.node, given["mask"])
        if given.get("key_mean") is not None:
            with graph.inserting_before(call.node):
                given["key_mean"] = emit(graph, torch.ops.aten.to.dtype, given["key_mean"], torch.float32)
        target = getattr(torch.ops.xkv, SERVED[call.node.target])
        call_instead(call.node, target.default, {**given, **launch, "count": count})


def _kernel() -> ModuleType:
    if importlib.util.find_spec("triton") is None:
        raise BackendError(
            "Triton is missing, which compiles for this model's GPU; install the triton that this torch was built for. "
            "backend='eager' runs without"
        )
    from xkv_fx.runtime.kernels import decode_coded_triton, decode_triton  # noqa: F401  (the first registers its ops)

    return decode_triton


def obstacle(kernel: ModuleType, given: Mapping[str, Any]) -> str | None:
    """Why the kernels do not serve a call with these arguments; None where they do.

    Args:
        kernel: `runtime.kernels.decode_triton`, which imports triton.
    """
    unfit = misfit(given, kernel.DTYPES)
    if unfit is not None:
        return unfit
    q, k, mask = given["q"], given["k"], given["mask"]
    (rows, kv_heads, _, key_dim), value_dim = k.shape, given["v"].shape[3]
    if "key_bits" in given and (key_dim % 2 or value_dim % 2):
        return f"head sizes {key_dim} and {value_dim}, of which one has no halves"
    group = q.shape[1] // kv_heads
    if kernel.query_bytes(group, key_dim, value_dim, q.dtype) > kernel.MOST_QUERY_BYTES:
        return f"{group} queries a KV head of head sizes {key_dim} and {value_dim} are too many at once"
    if mask.shape[0] != rows or mask.shape[1] not in (1, kv_heads, q.shape[1]):
        return f"a mask of shape {list(mask.shape)}"
    if not all(given[name].is_contiguous() for name in BUFFERS if name in given):
        return "a cache that is not contiguous"
    return None


def _count(node: Node, mask: Node) -> Node:
    """One more than the last valid slot of each row. Layers that share a mask share its count. A layer that uses the
    beginning of a longer mask shares that mask's count: it has no slots beyond its own last one to read."""
    source = mask
    while source.target is torch.ops.aten.slice.Tensor and source.args[1:3] == (3, 0):
        source = source.args[0]  # type: ignore[assignment]
    if "count" not in source.meta:
        with node.graph.inserting_before(node):  # the first of the layers that read it
            source.meta["count"] = inline(node.graph, _last_valid, source)
    found: Node = source.meta["count"]
    return found


def _last_valid(mask: Tensor) -> Tensor:
    place = torch.arange(1, mask.shape[3] + 1, device=mask.device)
    return ((mask > float("-inf")) * place).amax((1, 2, 3))


def _launch(kernel: ModuleType, values: dict[str, Any]) -> dict[str, int]:
    k, v, (rows, kv_heads, slots) = values["k"], values["v"], values["k_cache"].shape[:3]
    processors = _PROCESSORS
    if torch.cuda.is_available():
        processors = torch.cuda.get_device_properties(k.device).multi_processor_count
    return dataclasses.asdict(kernel.plan_launch(rows, kv_heads, slots, k.shape[3], v.shape[3], k.dtype, processors))


KERNEL = Kernel(ATTENTION, "Triton kernel", _accepts, _use, device="cuda")
