"""Splitting an attention whose KV heads are planned differently, so that each part owns a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from xkv_fx.errors import PassError
from xkv_fx.heads import HeadGroup, runs_of
from xkv_fx.passes.analyses.find_attention import AttentionSite, attention_sites, mark_heads
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.graph import emit

aten = torch.ops.aten
HEADS_DIM = 1


@dataclasses.dataclass(frozen=True)
class SplitHeads(GraphPass):
    """Before: an attention has all KV heads of its layer. After: where these are in several groups, there is one
    attention for each group, over the group's queries, keys and values alone; their outputs stand side by side in the
    order of heads. Attentions that shared keys and values share those of each group. Others stay as they were.

        attention(q, k, v)  ->  cat(attention(q[:, :6], k[:, :2], v[:, :2]), attention(q[:, 6:], k[:, 2:], v[:, 2:]))

    Groups are of equal plans, neighbours or not: the fewest ops, since heads that are no neighbours are put side by
    side for one token only, and in a prompt once a layer.

    Attributes:
        groups: of all layers that own a cache, in their order.
    """

    groups: tuple[HeadGroup, ...]
    name: ClassVar[str] = "split_heads"

    def run(self, module: GraphModule) -> PassRecord:
        sites = attention_sites(module)
        of_layer: dict[int, list[HeadGroup]] = {}
        for group in self.groups:
            of_layer.setdefault(group.layer, []).append(group)
        if set(of_layer) != {site.index for site in sites}:
            raise PassError(f"the graph's {len(sites)} attentions are not those of the {len(of_layer)} planned layers")
        parts = _Parts(module.graph)
        split = [site for site in sites if len(of_layer[site.index]) > 1]
        for site in split:
            _split(module.graph, site, of_layer[site.index], parts)
        made = sum(len(of_layer[site.index]) for site in split)
        return PassRecord(self.name, len(sites), len(split), f"{made} attentions in the place of {len(split)}")


class _Parts:
    """Parts of tensors, each made once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[Node, int, tuple[int, ...], int], Node] = {}

    def of(self, whole: Any, heads: tuple[int, ...], width: int = 1, dim: int = HEADS_DIM) -> Any:
        """The places of these heads, each `width` wide, along a dimension; None of None."""
        if whole is None:
            return None
        key = (whole, width, heads, dim)
        if key not in self._made:
            runs = [(first * width, end * width) for first, end in runs_of(heads)]
            self._made[key] = _side_by_side(self._graph, [(whole, *run) for run in runs], dim)
        return self._made[key]


def _split(graph: Graph, site: AttentionSite, groups: Sequence[HeadGroup], parts: _Parts) -> None:
    width = site.spec.query_heads // site.spec.kv_heads
    form = site.form
    outputs: dict[int, tuple[Node, int]] = {}
    with graph.inserting_before(site.node):
        for group in groups:
            q, k, v = parts.of(site.q, group.heads, width), parts.of(site.k, group.heads), parts.of(site.v, group.heads)
            sink_logits, slopes = (parts.of(whole, group.heads, width, 0) for whole in (form.sink_logits, form.slopes))
            attended = emit(
                graph, torch.ops.xkv.attention.default, q, k, v, site.layer, form.scale, form.sliding_window,
                form.softcap, sink_logits, slopes, *form.index_arguments,
            )  # fmt: skip
            mark_heads(attended, group.heads)
            outputs |= {head: (attended, place) for place, head in enumerate(group.heads)}
        joined = _side_by_side(graph, _runs_of_outputs(outputs, width), HEADS_DIM)
    site.node.replace_all_uses_with(joined)
    graph.erase_node(site.node)


def _runs_of_outputs(outputs: dict[int, tuple[Node, int]], width: int) -> list[tuple[Node, int, int]]:
    """Which query heads of which output come one after another, in the order of the layer's heads."""
    runs: list[tuple[Node, int, int]] = []
    for head in range(len(outputs)):
        output, place = outputs[head]
        if runs and runs[-1][0] is output and runs[-1][2] == place * width:
            runs[-1] = (output, runs[-1][1], (place + 1) * width)
        else:
            runs.append((output, place * width, (place + 1) * width))
    return runs


def _side_by_side(graph: Graph, runs: Sequence[tuple[Node, int, int]], dim: int) -> Node:
    """Parts of tensors along a dimension, each from a start to an end."""
    pieces = [
        node
        if (start, end) == (0, node.meta["val"].shape[dim])
        else emit(graph, aten.slice.Tensor, node, dim, start, end)
        for node, start, end in runs
    ]
    return pieces[0] if len(pieces) == 1 else emit(graph, aten.cat.default, pieces, dim)
