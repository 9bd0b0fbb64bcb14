"""Finding the attention nodes of a captured graph, and what each of them caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from xkv_fx.errors import BudgetError, UnsupportedModelError
from xkv_fx.layers import LayerSpec
from xkv_fx.passes.tools.graph import arguments, calls
from xkv_fx.runtime import ops  # noqa: F401  (registers the ops)
from xkv_fx.runtime.form import AttentionForm, Index

_HEADS = "xkv_heads"


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One `xkv::attention` node and its arguments.

    Attributes:
        index: place of its cache among all caches.
        borrows: its K/V are those of an earlier attention, which owns the cache (Gemma 3n).
        node: itself.
        layer: which layer of the model calls it.
        q, k, v: queries, keys and values.
        form: how it makes its weights; sink logits and slopes are nodes.
        spec: what a cache of it keeps.
        heads: which KV heads of its layer it has, where `SplitHeads` made it; None for all of them.
    """

    index: int
    borrows: bool
    node: Node
    layer: int
    q: Node
    k: Node
    v: Node
    form: AttentionForm
    spec: LayerSpec
    heads: tuple[int, ...] | None = None


def attention_sites(module: GraphModule) -> tuple[AttentionSite, ...]:
    """The attention nodes in execution order. A layer that attends several times has as many of them.

    Raises:
        UnsupportedModelError: none was captured.
    """
    sites: list[AttentionSite] = []
    owners: dict[tuple[object, ...], int] = {}
    for node in calls(module, torch.ops.xkv.attention.default):
        named = arguments(node)
        cached = (named["k"], named["v"], named["sliding_window"])  # of another window, it keeps other tokens
        borrows = cached in owners
        sites.append(_site(owners.setdefault(cached, len(owners)), borrows, node))
    if not sites:
        raise UnsupportedModelError(
            "no attention was found: the model neither calls it through transformers' attention interface nor writes "
            "it out as softmax(queries @ keys) @ values or scaled_dot_product_attention"
        )
    return tuple(sites)


def mark_heads(node: Node, heads: tuple[int, ...]) -> None:
    """Say which KV heads of its layer an attention has: its queries, keys and values are these heads' parts of the
    layer's, slices of them or several put side by side."""
    node.meta[_HEADS] = heads


def queries_of_layer(site: AttentionSite) -> Node:
    """The queries of all heads of the attention's layer."""
    if site.heads is None:
        return site.q
    piece: Any = site.q.args[0][0] if site.q.target is torch.ops.aten.cat.default else site.q  # type: ignore[index]
    whole: Node = piece.args[0]
    return whole


def cached_layers(sites: Sequence[AttentionSite]) -> tuple[LayerSpec, ...]:
    """What each attention that owns a cache keeps in it, in execution order."""
    return tuple(site.spec for site in sites if not site.borrows)


def any_latent(layers: Sequence[LayerSpec]) -> bool:
    """Whether a layer caches latents, its values being its keys."""
    return any(spec.value_dim == 0 for spec in layers)


def check_borrowed(site: AttentionSite, eviction: str) -> None:
    """Raise BudgetError where an attention borrows K/V whose cache evicts by score: each reader would need its own."""
    if site.borrows and eviction == "scored":
        raise BudgetError(
            f"layer {site.layer} attends to the keys and values of an earlier layer, which eviction='scored' does not "
            "support; choose 'ring' or 'append'"
        )


def _site(index: int, borrows: bool, node: Node) -> AttentionSite:
    named = arguments(node)
    q, k, v = (named[name].meta["val"] for name in "qkv")
    spec = LayerSpec(
        query_heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        key_dim=int(k.shape[3]),
        value_dim=0 if named["v"] is named["k"] else int(v.shape[3]),
        itemsize=k.dtype.itemsize,
        sliding_window=named["sliding_window"],
        index_dim=0 if named["top_k"] is None else int(named["index_keys"].meta["val"].shape[3]),
    )
    picks = Index.of(*(named.pop(name) for name in ("index_queries", "index_keys", "index_weights", "top_k")))
    tensors = {name: named.pop(name) for name in ("layer", "q", "k", "v")}
    heads = node.meta.get(_HEADS)
    form = AttentionForm(**named, index=picks)
    return AttentionSite(index=index, borrows=borrows, node=node, form=form, spec=spec, heads=heads, **tensors)
