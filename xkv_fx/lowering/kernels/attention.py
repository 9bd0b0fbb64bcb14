"""Which code each decode attention becomes when its graph is compiled."""

from __future__ import annotations

import collections

import torch
from torch.fx import GraphModule, Node

from xkv_fx.lowering.kernels.attention_triton import use_triton
from xkv_fx.passes.tools.graph import arguments, call_instead, emit
from xkv_fx.runtime.kernels import decode_cpu
from xkv_fx.runtime.kernels.build_cpu import DTYPES, STEP
from xkv_fx.runtime.ops import DECOMPOSITIONS


def choose_attention(module: GraphModule) -> str:
    """Put our kernel, or plain torch that the compiler sees into, in the place of each budgeted op that has either.

    Returns:
        what was chosen for how many layers, and why not the kernel, for people to read.

    Raises:
        BackendError: the kernel cannot be built, or Triton is missing for a GPU.
    """
    chosen: collections.Counter[str] = collections.Counter()
    for node in module.graph.nodes:
        if node.target not in DECOMPOSITIONS:
            continue
        on_gpu = arguments(node)["k_cache"].meta["val"].device.type == "cuda"
        obstacle = use_triton(node) if on_gpu else _use_cpu_kernel(node)
        if obstacle is not None:
            node.target = DECOMPOSITIONS[node.target]
        kernel = "Triton kernel" if on_gpu else "CPU kernel"
        chosen[kernel if obstacle is None else f"torch ops ({obstacle})"] += 1
    module.recompile()
    return ", ".join(f"{count} layers by {code}" for code, count in chosen.items())


def _obstacle(node: Node) -> str | None:
    """Why the CPU kernel does not serve here; None if it does."""
    if node.target is not torch.ops.xkv.decode_attention.default:
        return "eviction by score"
    given = arguments(node)
    k_cache, v_cache = given["k_cache"].meta["val"], given["v_cache"].meta["val"]
    if k_cache.device.type != "cpu":
        return f"device {k_cache.device.type}"
    if k_cache.dtype not in DTYPES:
        return f"dtype {k_cache.dtype}"
    if not v_cache.shape[3]:
        return "values that are the keys"
    if k_cache.shape[3] % STEP or v_cache.shape[3] % STEP:
        return f"head sizes {k_cache.shape[3]} and {v_cache.shape[3]} are not multiples of {STEP}"
    mask = given["mask"].meta["val"]
    if mask.dtype != k_cache.dtype or mask.shape[1] not in (1, k_cache.shape[1]):
        return "biased attention"
    return None


def _use_cpu_kernel(node: Node) -> str | None:
    """Put the CPU kernel in the place of `node`; returns why it does not serve, and then leaves the node as it is."""
    obstacle = _obstacle(node)
    if obstacle is not None:
        return obstacle
    given = arguments(node)
    q, k_cache, v_cache = (given[name].meta["val"] for name in ("q", "k_cache", "v_cache"))
    decode_cpu.build(q.dtype, q.shape[1] // k_cache.shape[1], k_cache.shape[3], v_cache.shape[3])
    if given["sink_logits"] is not None:
        with node.graph.inserting_before(node):
            given["sink_logits"] = emit(node.graph, torch.ops.aten.to.dtype, given["sink_logits"], torch.float32)
    call_instead(node, torch.ops.xkv.decode_attention_cpu.default, given)
    return None
