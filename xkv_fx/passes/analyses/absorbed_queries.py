"""What `AbsorbLatents` made of an attention's queries, read off the graph again.

q' = cat(bmm(q_nope, weights), q_rope), both parts being slices of q
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from xkv_fx.passes.analyses.find_attention import AttentionSite
from xkv_fx.passes.tools.dependence import ValueFlow
from xkv_fx.passes.tools.graph import arguments
from xkv_fx.passes.tools.inline import inline

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class AbsorbedQueries:
    """Queries that were made queries of a latent.

    Attributes:
        q: what they were before, `[rows, heads, S, key_dim]`.
        weights: `[heads, stop - start, rank]`, what the part from `start` to `stop` is multiplied by.
    """

    q: Node
    weights: Node
    start: int
    stop: int

    @classmethod
    def of(cls, site: AttentionSite) -> AbsorbedQueries | None:
        """None where the queries are as the model made them."""
        if site.k is not site.v or site.q.target is not aten.cat.default:
            return None
        parts: Any = site.q.args[0]
        product = _back(parts[0], aten.bmm.default)
        part = None if product is None else _back(product.args[0], aten.slice.Tensor)
        if product is None or part is None or part.args[0] is not parts[1].args[0]:
            return None
        given = arguments(part)
        return cls(given["self"], product.args[1], given["start"], given["end"])  # type: ignore[arg-type]

    def rotated(self, module: GraphModule, flow: ValueFlow, mean: GraphModule) -> GraphModule:
        """`mean`, which gives `[rows, dim, key_dim]`, behind which the same is done as with the queries:
        `[rows, heads, dim, ...]`."""
        piece = Graph()
        copies: dict[Node, Node] = {}
        rotated = piece.graph_copy(mean.graph, copies)
        made = flow.behind([self.weights])
        for node in module.graph.nodes:
            if node in made:
                copies[node] = piece.node_copy(node, copies.__getitem__)
        piece.output(inline(piece, self._absorb, rotated, copies[self.weights]))  # type: ignore[arg-type]
        return GraphModule(module, piece)

    def _absorb(self, mean: Tensor, weights: Tensor) -> Tensor:
        over_latent = torch.matmul(mean[:, None, :, self.start : self.stop], weights.to(mean.dtype))
        rest = torch.cat((mean[..., : self.start], mean[..., self.stop :]), -1)
        return torch.cat((over_latent, rest[:, None].expand(-1, weights.shape[0], -1, -1)), -1)


def _back(start: Any, target: object) -> Node | None:
    """The first node of that kind on the way back through first arguments."""
    node = start
    while isinstance(node, Node) and node.target is not target:
        node = node.args[0] if node.args else None
    return node if isinstance(node, Node) else None
