"""What other papers' allocators rank layers by, beside the scores that a profile is made of."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xkv_fx.errors import BudgetError
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.find_attention import attention_sites
from xkv_fx.passes.find_residual import residual_of
from xkv_fx.passes.graph import at_end, emit, inline, named, output_node
from xkv_fx.passes.insert_cache import scoring
from xkv_fx.runtime.scorers import PromptView, score_tokens

# Newest queries whose attention CAKE looks at; its reference code's default.
OBSERVATION_WINDOW = 32
STATISTICS = ("preference", "similarity")


@dataclasses.dataclass(frozen=True)
class AttentionOfLast:
    """CAKE's preference (arXiv 2503.12491, section 4.1): entropy of the attention of the newest queries, times the
    variance over these queries of the attention that each token is paid; the mean over heads. One number a KV head."""

    paper: ClassVar[str] = "CAKE, arXiv 2503.12491"
    looks_at_question: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False
    measures_attention: ClassVar[bool] = False

    def __call__(self, prompt: PromptView) -> Tensor:
        """`[rows, kv_heads, S]`, in the first place the preference and 0 elsewhere."""
        count = min(OBSERVATION_WINDOW, int(prompt.length.min()))
        paid = prompt.attention_of_last(count)
        spread = torch.special.entr(paid).sum(-1).mean(-1)
        shift = paid.var(3, correction=0).sum(-1)
        result = torch.zeros(prompt.k.shape[:3], dtype=torch.float32, device=prompt.k.device)
        result[:, :, 0] = (spread.mean(2) * shift.mean(2)).float()
        return result


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
        length = named(graph, "length")
        sites = attention_sites(module)
        output = output_node(graph)
        logits: Any = output.args[0]
        outputs: list[Node] = [logits]
        for statistic in self.statistics:
            for site in sites:
                if statistic == "preference":
                    score = scoring(
                        score_tokens, AttentionOfLast(), sliding_window=site.sliding_window, softcap=site.softcap
                    )
                    with graph.inserting_after(site.node):
                        paid = emit(
                            graph, score, site.q, site.k, None, length, None, site.scale, sinks=site.sinks,
                            slopes=site.slopes, name=f"preference_{site.index}",
                        )  # fmt: skip
                    with at_end(graph):
                        outputs.append(inline(graph, _first_of_heads, paid))
                elif statistic == "similarity":
                    before, after = residual_of(module, site)
                    with at_end(graph):
                        outputs.append(inline(graph, _cosine, before, after, length))
                else:
                    raise BudgetError(f"unknown statistic {statistic!r}; choose among {', '.join(STATISTICS)}")
        output.args = (tuple(outputs),)
        return PassRecord(self.name, len(sites), len(outputs) - 1, ", ".join(self.statistics))


def _first_of_heads(paid: Tensor) -> Tensor:
    return paid[:, :, 0].mean(1)


def _cosine(before: Tensor, after: Tensor, length: Tensor) -> Tensor:
    there = torch.arange(before.shape[1], device=before.device) < length[:, None]
    cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), -1)
    return (cosine * there).sum(1) / length
