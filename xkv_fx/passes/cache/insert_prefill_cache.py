"""Giving the attentions of a first prompt their caches."""

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
class InsertPrefillCache(GraphPass):
    """Before: `CompactPadding` has run. After: the states of the plan are inputs, and behind each attention its tokens
    are scored and the survivors written to that layer's buffers before the next layer runs; what the buffers held is
    forgotten.

        attention(q, k, v)  ->  attention(q, k, v); scores = score(q, k, ...); keep(k, v, ..., k_cache, v_cache, ...)
    """

    plan: CachePlan
    scorer: Scorer
    name: ClassVar[str] = "insert_prefill_cache"

    def run(self, module: GraphModule) -> PassRecord:
        build = GraphBuild(module, self.plan, self.scorer)
        owners = [site for site in build.sites if not site.borrows]
        for site in owners:
            with module.graph.inserting_before(site.node.next):
                build.state_of(site).prefill(build, site)
        build.carry_states("prefill")
        with at_end(module.graph):
            for state in self.plan.states:
                state.finish(build, "prefill")
        note = f"scorer {self.scorer}{build.borrowed}{build.carried}"
        return PassRecord(self.name, len(build.sites), 2 * len(owners), note)
