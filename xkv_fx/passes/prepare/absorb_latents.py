"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): what is cached is the latent.

Such an attention makes each head's keys and values from one latent c of a token, by linear maps, and gives all heads
the same rotary key r:

    k_h = [c W_kh', r]      v_h = c W_vh'      out_h = softmax(q_h k_h') v_h

The maps go over to queries and outputs, and what is left is attention with one KV head, whose keys are [c, r] and whose
values are c:

    q_h k_h' = [q_h,nope W_kh, q_h,rope] [c, r]'      out_h = (softmax(...) c) W_vh'
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch.fx import Graph, GraphModule, Node

from xkv_fx.passes.analyses.find_attention import attention_sites
from xkv_fx.passes.analyses.find_latents import Latent, find_latent, written_in_place
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.prepare.join_parts import join_parts
from xkv_fx.passes.tools.graph import run_fake
from xkv_fx.passes.tools.inline import inline


@dataclasses.dataclass(frozen=True)
class AbsorbLatents(GraphPass):
    """Before: `CleanGraph` has run, and every attention is a node. After: each that is proved to be of that kind, where
    this saves bytes, has one KV head, and one node for keys and values alike, the latent and the rotary key side by
    side; the output's part from the rotary key is cut off. Others stay as they were. Weights are shared, not copied.

        attention(q, k, v)  ->  attention([q_nope W_k, q_rope], [c, r], [c, r])[..., :rank] W_v'
    """

    name: ClassVar[str] = "absorb_latents"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        for keys in dict.fromkeys(site.k for site in attention_sites(module)):
            join_parts(keys)
        written = written_in_place(graph)
        sites = attention_sites(module)
        joined: dict[tuple[Node, Node], Node] = {}
        changed = 0
        for site in sites:
            spec, pair = site.spec, (site.k, site.v)
            found = find_latent(module, written, *pair) if spec.query_heads == spec.kv_heads else None
            if found is None or found.size >= spec.kv_heads * (spec.key_dim + spec.value_dim):
                continue
            if pair not in joined:  # attentions that share keys and values go on sharing them
                with graph.inserting_before(site.node):
                    joined[pair] = inline(graph, found.join, *found.parts)
            _absorb(graph, site.node, found, joined[pair])
            changed += 1
        return PassRecord(self.name, len(sites), changed)


def _absorb(graph: Graph, attention: Node, latent: Latent, joined: Node) -> None:
    readers = list(attention.users)
    with graph.inserting_before(attention):
        queries = inline(graph, latent.queries, attention.args[0], latent.keys.weight)  # type: ignore[arg-type]
    attention.args = (queries, joined, joined, *attention.args[3:])
    attention.meta["val"] = run_fake(graph, attention.target, attention.args, attention.kwargs)
    with graph.inserting_before(attention.next):
        out = inline(graph, latent.outputs, attention, latent.values.weight)
    for reader in readers:
        reader.replace_input_with(attention, out)
