"""Giving the attentions of one token their caches."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch.fx import GraphModule

from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.cache.graph_build import GraphBuild
from xkv_fx.passes.tools.graph import at_end
from xkv_fx.runtime.state import CachePlan


@dataclasses.dataclass(frozen=True)
class InsertDecodeCache(GraphPass):
    """Before: a graph of one token, all shapes static. After: the states of the plan are inputs, and each attention
    writes its token into one slot of its layer's buffers and attends to the valid ones; one that borrows its K/V writes
    what is there already. Slot and mask are computed once for all layers of equal plans, where they follow from
    counters alone.

        attention(q, k, v)  ->  decode_attention(q, k, v, k_cache, v_cache, slot, mask, ...)
    """

    plan: CachePlan
    name: ClassVar[str] = "insert_decode_cache"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        build = GraphBuild(module, self.plan)
        for site in build.sites:
            with graph.inserting_before(site.node):
                attended = build.state_of(site).decode(build, site)
            site.node.replace_all_uses_with(attended)
        for site in build.sites:
            graph.erase_node(site.node)
        build.carry_states("decode")
        with at_end(graph):
            for state in self.plan.states:
                state.finish(build, "decode")
        groups = len({cache.slots for cache in self.plan.caches if cache.slots.eviction != "scored"})
        note = f"{groups} groups of layers share a slot{build.borrowed}{build.carried}"
        return PassRecord(self.name, len(build.sites), len(build.sites), note)
