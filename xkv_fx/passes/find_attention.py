"""Finding the attention nodes of a captured graph, and what each of them caches."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule, Node

from xkv_fx.budgets import LayerSpec
from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.graph import arguments, calls
from xkv_fx.runtime import ops  # noqa: F401  (registers the ops)


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One `xkv::attention` node and its arguments; `index` is its place among the layers that own a cache."""

    index: int
    node: Node
    layer: int
    q: Node
    k: Node
    v: Node
    scale: float
    sliding_window: int | None
    softcap: float | None
    sinks: Node | None
    slopes: Node | None
    spec: LayerSpec


def attention_sites(module: GraphModule) -> tuple[AttentionSite, ...]:
    """The attention nodes in execution order. A layer that attends several times has as many of them.

    Raises:
        UnsupportedModelError: none was captured.
    """
    sites = tuple(_site(index, node) for index, node in enumerate(calls(module, torch.ops.xkv.attention.default)))
    if not sites:
        raise UnsupportedModelError(
            "no attention was found: the model neither calls it through transformers' attention interface nor writes "
            "it out as softmax(queries @ keys) @ values or scaled_dot_product_attention"
        )
    return sites


def _site(index: int, node: Node) -> AttentionSite:
    named = arguments(node)
    q, k, v = (named[name].meta["val"] for name in "qkv")
    spec = LayerSpec(
        query_heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        key_dim=int(k.shape[3]),
        value_dim=int(v.shape[3]),
        itemsize=k.dtype.itemsize,
        sliding_window=named["sliding_window"],
    )
    return AttentionSite(index=index, node=node, spec=spec, **named)
