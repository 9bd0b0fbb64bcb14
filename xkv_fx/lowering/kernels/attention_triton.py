"""Decode attention on GPU by our Triton kernels, under eviction by score too: one for slots in the model's dtype, one
for slots of fewer bits."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from xkv_fx.errors import BackendError
from xkv_fx.lowering.kernels import attention_coded_triton
from xkv_fx.lowering.kernels.attention import ATTENTION, DECODE, DECODE_CODED, DECODE_CODED_SCORED
from xkv_fx.lowering.kernels.kernel import Call, Kernel
from xkv_fx.passes.tools.graph import call_instead
from xkv_fx.passes.tools.inline import inline

_log = logging.getLogger(__name__)
_PROCESSORS = 108  # assumed for a GPU that is not there to be asked, as when only fake tensors stand for it


def _accepts(call: Call) -> str | None:
    """Why not is also logged.

    Raises:
        BackendError: Triton is missing.
    """
    misfit = attention_coded_triton.obstacle if _coded(call) else _obstacle
    obstacle = misfit(_kernel(), call.values)
    if obstacle is not None:
        _log.warning("%s is not served by the Triton kernel (%s); torch ops take its place", call.node.name, obstacle)
    return obstacle


def _use(calls: Sequence[Call]) -> None:
    for call in calls:
        given = call.given
        launch, count = _launch(_kernel(), call.values), _count(call.node, given["mask"])
        if _coded(call):
            attention_coded_triton.use(call, launch, count)
            continue
        plain = call.node.target is DECODE
        target = torch.ops.xkv.decode_attention_triton if plain else torch.ops.xkv.decode_scored_triton
        call_instead(call.node, target.default, {**given, **launch, "count": count})


def _coded(call: Call) -> bool:
    return call.node.target in (DECODE_CODED, DECODE_CODED_SCORED)


def _kernel() -> ModuleType:
    if importlib.util.find_spec("triton") is None:
        raise BackendError(
            "Triton is missing, which compiles for this model's GPU; install the triton that this torch was built for. "
            "backend='eager' runs without"
        )
    from xkv_fx.runtime.kernels import decode_triton

    return decode_triton


def _obstacle(kernel: ModuleType, given: dict[str, Any]) -> str | None:
    q, k_cache, v_cache, mask = given["q"], given["k_cache"], given["v_cache"], given["mask"]
    rows, kv_heads, _, key_dim = k_cache.shape
    if k_cache.dtype not in kernel.DTYPES:
        return f"dtype {k_cache.dtype}"
    if any(given[name].dtype != k_cache.dtype for name in ("q", "k", "v", "v_cache")):
        return "queries, keys and values of different dtypes"
    if not v_cache.shape[3]:
        return "values that are the keys"
    group = q.shape[1] // kv_heads
    if kernel.query_bytes(group, key_dim, v_cache.shape[3], k_cache.dtype) > kernel.MOST_QUERY_BYTES:
        return f"{group} queries a KV head of head sizes {key_dim} and {v_cache.shape[3]} are too many at once"
    if mask.shape[0] != rows or mask.shape[1] not in (1, kv_heads, q.shape[1]):
        return f"a mask of shape {list(mask.shape)}"
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
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
