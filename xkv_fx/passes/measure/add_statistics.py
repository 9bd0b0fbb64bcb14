"""The statistics by which other papers' allocators rank layers, added beside the scores that a profile is made of."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xkv_fx.errors import BudgetError
from xkv_fx.passes.analyses.find_attention import attention_sites
from xkv_fx.passes.analyses.find_residual import residual_of
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.dependence import ValueFlow
from xkv_fx.passes.tools.graph import at_end, emit, output_node
from xkv_fx.passes.tools.inline import inline
from xkv_fx.passes.tools.roles import LENGTH, with_role
from xkv_fx.runtime.form import AttentionForm
from xkv_fx.runtime.scorers import PromptView

# Newest queries whose attention CAKE looks at; its reference code's default.
OBSERVATION_WINDOW = 32
STATISTICS = ("preference", "similarity")


def preference(
    q: Tensor,
    k: Tensor,
    length: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """CAKE's preference (arXiv 2503.12491, section 4.1) of one layer, float32 `[rows]`.

    The entropy of the attention of the newest queries, times the variance over these queries of the attention that each
    token is paid; the mean over heads. See `PromptView` for the arguments.
    """
    seen = torch.zeros_like(length)
    prompt = PromptView(q, k, None, length, AttentionForm(scale, sliding_window, softcap, sink_logits, slopes), seen)
    paid = prompt.attention_of_last(min(OBSERVATION_WINDOW, int(length.min())))
    spread = torch.special.entr(paid).sum(-1).mean(-1)
    shift = paid.var(3, correction=0).sum(-1)
    of_heads: Tensor = spread.mean(2) * shift.mean(2)
    return of_heads.mean(1).float()


# Passes take its shape from here: it counts tokens, which must not become a number in the graph.
preference.fake = lambda q, k, *args, **kwargs: k.new_empty(k.shape[:1], dtype=torch.float32)  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class AddStatistics(GraphPass):
    """Before: the graph returns logits, and `CompactPadding` has run. After: it returns a tuple of the logits and, for
    each statistic that is asked for, one number a layer, float32 `[rows]`.

    `"preference"` is CAKE's (arXiv 2503.12491). `"similarity"` is SqueezeAttention's (arXiv 2404.04793, section 3.1):
    the cosine between the hidden state before an attention and after its output was added, the mean over tokens. It
    keeps the last layer's attention and output projection alive, which no score needs.
    """

    statistics: tuple[str, ...]
    name: ClassVar[str] = "add_statistics"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        length = with_role(graph, LENGTH)
        sites = [site for site in attention_sites(module) if not site.borrows]
        flow = ValueFlow(graph)
        output = output_node(graph)
        logits: Any = output.args[0]
        outputs: list[Node] = [logits]
        for statistic in self.statistics:
            for site in sites:
                form = site.form
                if statistic == "preference":
                    with graph.inserting_after(site.node):
                        outputs.append(
                            emit(
                                graph, preference, site.q, site.k, length, form.scale, form.sliding_window,
                                form.softcap, form.sink_logits, form.slopes, name=f"preference_{site.index}",
                            )
                        )  # fmt: skip
                elif statistic == "similarity":
                    before, after = residual_of(module, flow, site)
                    with at_end(graph):
                        outputs.append(inline(graph, _cosine, before, after, length))
                else:
                    raise BudgetError(f"unknown statistic {statistic!r}; choose among {', '.join(STATISTICS)}")
        output.args = (tuple(outputs),)
        return PassRecord(self.name, len(sites), len(outputs) - 1, ", ".join(self.statistics))


def _cosine(before: Tensor, after: Tensor, length: Tensor) -> Tensor:
    there = torch.arange(before.shape[1], device=before.device) < length[:, None]
    cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), -1)
    return (cosine * there).sum(1) / length
