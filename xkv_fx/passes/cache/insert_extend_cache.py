"""Giving the attentions of a turn, or of a chunk of a prompt, the caches that they go on from."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch.fx import GraphModule

from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.cache.graph_build import GraphBuild
from xkv_fx.passes.tools.graph import at_end
from xkv_fx.runtime.scorers import Scorer
from xkv_fx.runtime.state import CachePlan


@dataclasses.dataclass(frozen=True)
class InsertExtendCache(GraphPass):
    """Before: `CompactPadding` has run. After: the states of the plan are inputs, each attention also reaches what its
    layer holds, and survivors are chosen again among that and the new tokens. A row without new tokens keeps its state.

        attention(q, k, v)  ->  extend_attention(q, k, v, k_cache, v_cache, mask, ...); score; keep
    """

    plan: CachePlan
    scorer: Scorer
    name: ClassVar[str] = "insert_extend_cache"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        build = GraphBuild(module, self.plan, self.scorer)
        last = {site.index: site for site in build.sites}
        owner = {site.index: site for site in build.sites if not site.borrows}
        for site in build.sites:
            with graph.inserting_before(site.node):
                attended = build.state_of(site).extend(build, site)
                if site is last[site.index]:  # by now every attention that reads this cache has run
                    build.state_of(owner[site.index]).keep(build, owner[site.index])
            site.node.replace_all_uses_with(attended)
        for site in build.sites:
            graph.erase_node(site.node)
        build.carry_states("extend")
        with at_end(graph):
            for state in self.plan.states:
                state.finish(build, "extend")
        note = f"scorer {self.scorer}{build.borrowed}{build.carried}"
        return PassRecord(self.name, len(build.sites), len(build.sites) + 2 * len(owner), note)
