"""Finding how positions rotate an attention's queries, for scorers that ask what queries to come will look like.

A rotary embedding, in whatever layout, takes the queries of a layer and multiplies each head's query of each token by a
matrix that depends on the token's position alone:

    queries -> ... (sums, parts, products with what is made from position_ids) ... -> q of xkv::attention

This module finds where that part of the graph begins. The mean of these matrices over coming positions is then computed
by running a copy of that part on the unit vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from xkv_fx.heads import runs_of
from xkv_fx.passes.analyses.absorbed_queries import AbsorbedQueries
from xkv_fx.passes.analyses.find_attention import AttentionSite, queries_of_layer
from xkv_fx.passes.analyses.mean_rotation import PlacedGraph, Rotation, as_it_is, refusal
from xkv_fx.passes.tools.dependence import READ_SIZES, ValueFlow, value_inputs
from xkv_fx.passes.tools.graph import placeholders
from xkv_fx.passes.tools.inline import inline
from xkv_fx.passes.tools.operators import CASTS, MOVES
from xkv_fx.passes.tools.roles import LENGTH, VALID, find_role, with_role
from xkv_fx.runtime.scorers import Scorer, future_positions

aten = torch.ops.aten
SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.neg.default)
PROJECTIONS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.conv1d.default,
)


@dataclasses.dataclass(frozen=True)
class QueryRotation:
    """How positions rotate the queries of one attention.

    Attributes:
        source: the node whose value the queries are before that.
        arrange: brings that value to `[rows, query_heads, S, dim]`.
        mean: `mean(newest)`, int64 `[rows]` -> float `[rows, dim, key_dim]`: what queries are multiplied by from the
            right, the mean over the positions behind each row's newest one. `[rows, query_heads, dim, key_dim]` where
            queries of latents are made of them behind that. None where positions do not rotate them.
    """

    source: Node
    arrange: Callable[[Tensor], Tensor]
    mean: GraphModule | None


def find_rotations(module: GraphModule, sites: Sequence[AttentionSite], count: int) -> tuple[QueryRotation, ...]:
    """How the queries of each attention are rotated, its mean taken over `count` positions. The graph is not changed.

    Layers that are rotated alike share one `mean`.

    Raises:
        UnsupportedModelError: positions enter the queries behind their projection, and not as a linear map of each
            head's query that is the same for all heads; the message names the layer.
    """
    finder = _Finder(module, sites)
    return tuple(finder.rotation(site, count) for site in sites)


def unrotated_inputs(
    module: GraphModule, sites: Sequence[AttentionSite], scorer: Scorer
) -> dict[Node, dict[str, Node | None]]:
    """For each attention node the further arguments that scores by `scorer` are computed from, added to the graph.

    Before: `CompactPadding` has run.

    Raises:
        BudgetError: see `future_positions`.
        UnsupportedModelError: see `find_rotations`.
    """
    count = future_positions(scorer)
    if count is None:
        return {site.node: {} for site in sites}
    graph = module.graph
    rotations = find_rotations(module, sites, count)
    positions = _positions(graph)
    means: dict[GraphModule, Node] = {}
    with graph.inserting_before(sites[0].node):
        for piece in dict.fromkeys(rotation.mean for rotation in rotations):
            if piece is not None and positions is not None:
                if not means:
                    newest = inline(graph, _newest, positions, with_role(graph, LENGTH), name="newest_position")
                given = dict.fromkeys(placeholders(piece.graph).values(), newest)  # its one input
                means[piece] = graph.graph_copy(piece.graph, given)  # type: ignore[assignment]
                means[piece]._rename("mean_rotation")
    inputs: dict[Node, dict[str, Node | None]] = {}
    for site, rotation in zip(sites, rotations, strict=True):
        with graph.inserting_before(site.node):
            unrotated = inline(graph, rotation.arrange, rotation.source)
        inputs[site.node] = {
            "unrotated": unrotated,
            "rotation": None if rotation.mean is None else means[rotation.mean],
        }
    return inputs


class _Finder:
    """Looks at one graph."""

    def __init__(self, module: GraphModule, sites: Sequence[AttentionSite]) -> None:
        graph = module.graph
        positions = _positions(graph)
        flow = ValueFlow(graph)
        self.tokens = flow.dependents(list(placeholders(graph).values())[:1])
        # An attention mixes tokens of all positions; what comes out of it belongs to none of them.
        attentions = [site.node for site in sites]
        self.placed = set() if positions is None else flow.dependents([positions], attentions)
        self.sizes = {node: node.meta["val"].node.expr for node in graph.nodes if _is_size(node)}
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.graph = PlacedGraph(module, flow, positions, self.placed, self.sizes, self.order)
        self._factors: dict[Node, int] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._means: dict[int, GraphModule] = {}

    def rotation(self, site: AttentionSite, count: int) -> QueryRotation:
        if site.heads is not None:
            return self._rotation_of_heads(site, site.heads, count)
        absorbed = AbsorbedQueries.of(site)
        if absorbed is not None:
            before = self.rotation(dataclasses.replace(site, q=absorbed.q), count)
            if before.mean is None:
                return QueryRotation(site.q, as_it_is, None)
            return dataclasses.replace(before, mean=absorbed.rotated(self.graph.module, self.graph.flow, before.mean))
        q = site.q
        if self._factors_of(q) == 0:
            self._check_unrotated(site, q)
            return QueryRotation(q, as_it_is, None)
        if self._factors_of(q) > 1:
            raise refusal(site, "they are multiplied by something of their positions twice")
        source, nodes = self._rotation_of(site)
        self._check_unrotated(site, source)
        factors = [factor for node in nodes if (factor := self.linear(node)[1]) in self.placed]
        found = Rotation(self.graph, site, source, nodes, sorted(set(factors), key=self.order.__getitem__))
        kind = self._kind(site.q, {source: self._number(("source", source.meta["val"].dtype, found.layout))})
        if kind not in self._means:
            found.prove()
            self._means[kind] = found.mean(count)
        return QueryRotation(source, found.arrange, self._means[kind])

    def _rotation_of_heads(self, site: AttentionSite, heads: tuple[int, ...], count: int) -> QueryRotation:
        """Of some heads' queries: all heads of a layer are rotated alike, and positions know nothing of the split."""
        of_layer = self.rotation(dataclasses.replace(site, q=queries_of_layer(site), heads=None), count)
        if of_layer.mean is None:
            return QueryRotation(site.q, as_it_is, None)
        width = int(site.q.meta["val"].shape[1]) // len(heads)

        def arrange(value: Tensor) -> Tensor:
            whole = of_layer.arrange(value)
            return torch.cat([whole[:, first * width : end * width] for first, end in runs_of(heads)], 1)

        return dataclasses.replace(of_layer, arrange=arrange)

    def _kind(self, node: Node, known: dict[Node, int]) -> int:
        """A number that is the same for values that are computed alike, from the very same tensors."""
        if node in known:
            return known[node]
        if node in self.sizes:
            kind: tuple[Any, ...] = ("size", str(self.sizes[node]))
        else:
            parts = map_arg((node.args, node.kwargs), lambda source: f"%{self._kind(source, known)}")
            kind = (node.op, str(node.target), "" if node is self.graph.positions else str(parts))
        known[node] = self._number(kind)
        return known[node]

    def _number(self, kind: tuple[Any, ...]) -> int:
        return self._numbers.setdefault(kind, len(self._numbers))

    def _factors_of(self, node: Node) -> int:
        """The most factors made from positions that any linear map leading up to a node's value has; 0 where no such
        factor comes after its last step that is not linear."""
        if node not in self.tokens or node not in self.placed:
            return 0
        if node not in self._factors:
            operands, factor = self.linear(node)
            deepest = max(map(self._factors_of, operands), default=0)
            self._factors[node] = deepest + (factor in self.placed if operands else 0)
        return self._factors[node]

    def linear(self, node: Node) -> tuple[list[Node], Any]:
        """What a node's value is a linear map of, and the factor that it is multiplied by; nothing if it is no such
        map of values of tokens."""
        nothing: tuple[list[Node], Any] = ([], None)
        if node.target in (aten.mul.Tensor, aten.div.Tensor):
            of_tokens = [argument for argument in node.args[:2] if argument in self.tokens]
            if len(of_tokens) != 1:
                return nothing
            factor = node.args[1] if of_tokens[0] is node.args[0] else node.args[0]
            if node.target is aten.div.Tensor and (of_tokens[0] is not node.args[0] or factor in self.placed):
                return nothing
            return of_tokens, factor  # type: ignore[return-value]
        operands = [source for source in value_inputs(node) if not _is_size(source)]
        if any(operand not in self.tokens for operand in operands):
            return nothing
        if node.target in SUMS and all(isinstance(argument, Node) for argument in node.args):
            return operands, None
        if node.target in MOVES and not (node.target in CASTS and _is_integer(node)):
            return operands, None
        return nothing

    def _rotation_of(self, site: AttentionSite) -> tuple[Node, set[Node]]:
        """The one node that q is a linear map of by factors of positions, and the nodes of that map."""
        nodes: set[Node] = set()
        sources: set[Node] = set()
        stack = [site.q]
        while stack:
            node = stack.pop()
            nodes.add(node)
            for operand in self.linear(node)[0]:
                if self._factors_of(operand) == 0:
                    sources.add(operand)
                elif operand not in nodes:
                    stack.append(operand)
        while len(sources) > 1 or any(map(_is_list, sources)):  # parts of one tensor, of which some are not rotated
            last = max(sources, key=self.order.__getitem__)
            operands, _ = self.linear(last)
            if not operands:
                raise refusal(site, f"they are put together from several values, {last.name} among them")
            sources.remove(last)
            sources.update(operands)
            nodes.add(last)
        (source,) = sources
        return source, nodes

    def _check_unrotated(self, site: AttentionSite, source: Node) -> None:
        """Positions may be part of the hidden state, but must not enter between the projection that makes queries and
        `source`."""
        stack, known = [source], {source}
        while stack:
            node = stack.pop()
            if node not in self.placed:
                continue
            operands = [source for source in value_inputs(node) if not _is_size(source)]
            if any(operand in self.placed and operand not in self.tokens for operand in operands):
                raise refusal(site, f"positions enter them in {node.name}, by what is not known to be a linear map")
            if node.target in PROJECTIONS:
                continue
            for operand in operands:
                if operand not in known:
                    known.add(operand)
                    stack.append(operand)


def _positions(graph: Graph) -> Node | None:
    """The position ids that the model sees, those that `CompactPadding` moved if it has run; None if it uses none."""
    positions = list(placeholders(graph).values())[1]
    if find_role(graph, VALID) is None:
        return positions
    return next((user for user in positions.users if user.target not in READ_SIZES), None)


def _newest(positions: Tensor, length: Tensor) -> Tensor:
    return positions.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0]


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _is_list(node: Node) -> bool:
    return isinstance(node.meta.get("val"), list | tuple)


def _is_integer(node: Node) -> bool:
    value = node.meta["val"]
    return not (value.is_floating_point() or value.is_complex())
