"""Decode attention over slots of fewer bits on GPU by our Triton kernel, under eviction by score too."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch.fx import Node

from xkv_fx.lowering.kernels.attention import DECODE_CODED
from xkv_fx.lowering.kernels.kernel import Call
from xkv_fx.passes.tools.graph import call_instead, emit

_BUFFERS = ("k_cache", "k_scales", "v_cache", "v_scales")


def obstacle(kernel: ModuleType, given: Mapping[str, Any]) -> str | None:
    """Why the kernel does not serve a call with these arguments; None where it does.

    Args:
        kernel: `runtime.kernels.decode_triton`, which imports triton.
    """
    q, k, v, mask = given["q"], given["k"], given["v"], given["mask"]
    rows, kv_heads, key_dim, value_dim = k.shape[0], k.shape[1], k.shape[3], v.shape[3]
    if q.dtype not in kernel.DTYPES:
        return f"dtype {q.dtype}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return "queries, keys and values of different dtypes"
    if not given["v_cache"].shape[3]:
        return "values that are the keys"
    if not (given["key_bits"] or given["value_bits"]):
        return "slots in the model's dtype by the op for fewer bits"
    if key_dim % 2 or value_dim % 2:
        return f"head sizes {key_dim} and {value_dim}, of which one has no halves"
    group = q.shape[1] // kv_heads
    if kernel.query_bytes(group, key_dim, value_dim, q.dtype) > kernel.MOST_QUERY_BYTES:
        return f"{group} queries a KV head of head sizes {key_dim} and {value_dim} are too many at once"
    if mask.shape[0] != rows or mask.shape[1] not in (1, kv_heads, q.shape[1]):
        return f"a mask of shape {list(mask.shape)}"
    if not all(given[name].is_contiguous() for name in _BUFFERS):
        return "a cache that is not contiguous"
    return None


def use(call: Call, launch: Mapping[str, int], count: Node) -> None:
    """Put the kernel in the place of the call.

    Args:
        launch: the fields of `decode_triton.Launch`.
        count: one more than the last valid slot of each row.
    """
    from xkv_fx.runtime.kernels import decode_coded_triton  # noqa: F401  (registers the ops)

    given, graph = call.given, call.node.graph
    if given["key_mean"] is not None:
        with graph.inserting_before(call.node):
            given["key_mean"] = emit(graph, torch.ops.aten.to.dtype, given["key_mean"], torch.float32)
    plain = call.node.target is DECODE_CODED
    target = torch.ops.xkv.decode_coded_triton if plain else torch.ops.xkv.decode_coded_scored_triton
    call_instead(call.node, target.default, {**given, **launch, "count": count})
