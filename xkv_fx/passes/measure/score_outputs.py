"""XKV's "lightweight variant" of the model: a graph that computes the scores of every layer and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch.fx import GraphModule

from xkv_fx.passes.analyses.find_attention import attention_sites
from xkv_fx.passes.analyses.find_rotation import unrotated_inputs
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.graph import emit, output_node
from xkv_fx.passes.tools.roles import LENGTH, with_role
from xkv_fx.runtime.scorers import Scorer, score_tokens, scoring_call


@dataclasses.dataclass(frozen=True)
class ScoreOutputs(GraphPass):
    """Before: `CompactPadding` has run. After: the graph returns each layer's scores, float32 `[rows, kv_heads, S]`,
    and what no score needs is gone: the output projection, the last layer's attention and MLP, and its values' path.
    Outputs behind the logits, where an earlier pass added some, follow the scores.

    XKV (arXiv 2412.05896): only what the scores need is run, and nothing after the last layer's scores.
    """

    scorer: Scorer
    name: ClassVar[str] = "score_outputs"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        length = with_role(graph, LENGTH)
        sites = [site for site in attention_sites(module) if not site.borrows]
        before_rotation = unrotated_inputs(module, sites, self.scorer)
        outputs = []
        before = len(graph.nodes)
        for site in sites:
            form = site.form
            score = scoring_call(score_tokens, self.scorer, sliding_window=form.sliding_window, softcap=form.softcap)
            values = site.v if self.scorer.reads_values else None
            with graph.inserting_after(site.node):
                outputs.append(
                    emit(
                        graph, score, site.q, site.k, values, length, None, form.scale,
                        sink_logits=form.sink_logits, slopes=form.slopes, **before_rotation[site.node],
                        name=f"scores_{site.index}",
                    )
                )  # fmt: skip
        output = output_node(graph)
        returned: Any = output.args[0]
        more = returned[1:] if isinstance(returned, tuple) else ()
        output.args = ((*outputs, *more),)
        graph.eliminate_dead_code()
        removed = before + len(outputs) - len(graph.nodes)
        return PassRecord(self.name, len(sites), len(outputs), f"{removed} nodes that no score needs are gone")
