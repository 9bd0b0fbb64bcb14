"""The mean over coming positions of the matrix that a rotary embedding multiplies queries by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.analyses.find_attention import AttentionSite
from xkv_fx.passes.tools.dependence import Evaluation, ValueFlow, size_at
from xkv_fx.passes.tools.graph import arguments, at_length, emit
from xkv_fx.passes.tools.inline import inline
from xkv_fx.passes.tools.operators import CASTS

aten = torch.ops.aten
PROBED = 3


@dataclasses.dataclass(frozen=True)
class PlacedGraph:
    """A graph and what in it is made from positions.

    Attributes:
        module: the graph's module.
        flow: what depends on what in it.
        positions: the position ids that the model sees; None if it uses none.
        placed: the nodes whose values depend on them, not only through an attention.
        sizes: the nodes that are numbers made from the number of tokens, and their formulas.
        order: the place of each node.
    """

    module: GraphModule
    flow: ValueFlow
    positions: Node | None
    placed: set[Node]
    sizes: Mapping[Node, Any]
    order: Mapping[Node, int]

    def at(self, positions: Tensor, given: dict[Node, Tensor]) -> Evaluation:
        """Values of the graph at given positions `[rows, tokens]`."""
        sizes = {node: int(at_length(size, positions.shape[1])) for node, size in self.sizes.items()}
        return Evaluation(self.module, {**sizes, self.positions: positions, **given})  # type: ignore[dict-item]


class Rotation:
    """The linear map between a layer's queries as they are projected and as they are rotated."""

    def __init__(
        self, graph: PlacedGraph, site: AttentionSite, source: Node, nodes: set[Node], factors: Sequence[Node]
    ) -> None:
        self.graph, self.site, self.source, self.factors = graph, site, source, factors
        self.nodes = sorted(nodes, key=graph.order.__getitem__)
        self.rows, self.heads = (int(size) for size in site.q.meta["val"].shape[:2])
        self.layout = size_at(source, 2), self.heads
        self.arrange, self._arrange_back = self._arrangement()
        probe = self.arrange(torch.empty(size_at(source, PROBED), device="meta"))
        self.dim = probe.shape[3]
        self.dtype = torch.promote_types(source.meta["val"].dtype, torch.float32)
        self.end = self._table_end()

    def mean(self, count: int) -> GraphModule:
        """The graph of `QueryRotation.mean`.

        No node of it multiplies two factors, so that the mean of the matrices is the matrix of the factors' means.
        """
        piece = Graph()
        newest = piece.placeholder("newest")
        device = self.source.meta["val"].device
        with self.source.meta["val"].fake_mode:
            newest.meta["val"] = torch.empty(self.rows, dtype=torch.int64, device=device)
        coming: dict[Node, Any] = {self.graph.positions: inline(piece, _coming(count, self.end), newest)}  # type: ignore[dict-item]
        tokens = math.ceil(self.dim / self.heads)
        known: dict[Node, Any] = {}
        for factor in self.factors:
            at_each = self._copy(piece, factor, coming, count)
            known[factor] = inline(piece, self._averaged(_token_dim(factor, self.site), tokens), at_each)
        known[self.source] = inline(piece, self._unit_vectors(tokens), newest)
        for node in self.nodes:
            if node.target in CASTS and not node.meta["val"].is_complex():
                known[node] = known[node.args[0]]  # type: ignore[index]
            else:
                self._copy(piece, node, known, tokens)
        dim = self.dim
        piece.output(inline(piece, lambda q: q.transpose(1, 2).flatten(1, 2)[:, :dim], known[self.site.q]))
        return GraphModule(self.graph.module, piece)

    def _copy(self, piece: Graph, node: Node, known: dict[Node, Any], tokens: int) -> Any:
        """Copy a node and what it is made from into `piece`, for so many tokens; `known` holds copies made before."""
        needed, stack = {node} - known.keys(), [node]
        while stack:
            each = stack.pop()
            for source in () if each in self.graph.sizes else each.all_input_nodes:
                if source not in needed and source not in known:
                    needed.add(source)
                    stack.append(source)
        for each in sorted(needed, key=self.graph.order.__getitem__):
            if each in self.graph.sizes:
                known[each] = int(at_length(self.graph.sizes[each], tokens))
            elif each.op == "get_attr":
                known[each] = piece.get_attr(str(each.target))
                known[each].meta["val"] = each.meta["val"]
            elif each.op == "call_function":
                args, kwargs = map_arg(each.args, known.__getitem__), map_arg(each.kwargs, known.__getitem__)
                known[each] = emit(piece, each.target, *args, **kwargs)  # type: ignore[arg-type]
            else:
                raise refusal(self.site, f"what rotates them is made from the input {each.name} too")
        return known[node]

    def prove(self) -> None:
        """Compare with what the graph itself makes of random queries.

        Raises:
            UnsupportedModelError: it is something else.
        """
        device = self.source.meta["val"].device
        newest = 3 + 5 * torch.arange(self.rows, device=device)
        if self.end is not None:
            newest = newest.clamp(max=max(self.end - 1 - PROBED, -1))
        positions = newest[:, None] + torch.arange(1, PROBED + 1, device=device)
        shape = size_at(self.source, PROBED)
        queries = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
            device, self.source.meta["val"].dtype
        )
        got = self.graph.at(positions, {self.source: queries}).value(self.site.q)
        with torch.no_grad():
            at_each = torch.stack([self.mean(1)(newest + step) for step in range(PROBED)], 1)
            error = (self.mean(PROBED)(newest) - at_each.mean(1)).abs().max()
            rotated = torch.matmul(self.arrange(queries).to(at_each.dtype)[:, :, :, None], at_each[:, None])[:, :, :, 0]
            error = torch.maximum(error, (rotated - got).abs().max())
        limit = 16 * torch.finfo(got.dtype).eps * max(1.0, float(got.abs().max()))
        if not float(error) <= limit:
            raise refusal(self.site, "positions do not rotate each head's query by the same matrix")

    def _arrangement(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """What brings the source to `[rows, heads, S, dim]`, and back."""
        heads = self.heads
        shape, open_dims = size_at(self.source, 2), _open_dims(self.source)
        if shape[0] == self.rows and len(open_dims) == 1 and shape[open_dims[0]] == 2:
            if len(shape) == 4 and open_dims == [2] and shape[1] == heads:
                return as_it_is, as_it_is
            if len(shape) == 4 and open_dims == [1] and shape[2] == heads:
                return _exchanged, _exchanged
            if len(shape) == 3 and open_dims == [1] and shape[2] % heads == 0:
                return (
                    lambda source: source.unflatten(2, (heads, -1)).transpose(1, 2),
                    lambda queries: queries.transpose(1, 2).flatten(2),
                )
        raise refusal(self.site, f"{self.source.name}, of shape {list(shape)} for two tokens, does not show the heads")

    def _unit_vectors(self, tokens: int) -> Callable[[Tensor], Tensor]:
        """The unit vectors as queries, one a head, of as many tokens as it takes."""
        rows, heads, dim, dtype, back = self.rows, self.heads, self.dim, self.dtype, self._arrange_back

        def make(newest: Tensor) -> Tensor:
            unit = torch.eye(tokens * heads, dim, dtype=dtype, device=newest.device).view(1, tokens, heads, dim)
            return back(unit.transpose(1, 2).expand(rows, -1, -1, -1)).contiguous()

        return make

    def _averaged(self, dim: int, tokens: int) -> Callable[[Tensor], Tensor]:
        def average(factor: Tensor) -> Tensor:
            wide = factor if factor.is_complex() else factor.to(self.dtype)
            return wide.mean(dim, keepdim=True).repeat_interleave(tokens, dim)

        return average

    def _table_end(self) -> int | None:
        """How many positions there are in the tables that factors are looked up in; None if there are none."""
        ends = []
        for node in self.graph.flow.behind(self.factors) & self.graph.placed:
            found = _looked_up(node)
            if found is None or found[1] not in self.graph.placed:
                continue
            table, index, dim = found
            positions = torch.arange(2, device=self.source.meta["val"].device).expand(self.rows, -1)
            first = int(self.graph.at(positions, {}).value(index).min())
            ends.append(int(table.meta["val"].shape[dim]) - first)
        return min(ends, default=None)


def refusal(site: AttentionSite, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"what positions do to the queries of layer {site.layer} cannot be told: {why}. Choose a scorer that does not "
        "need unrotated queries"
    )


def _coming(count: int, end: int | None) -> Callable[[Tensor], Tensor]:
    """Positions `[rows, count]` behind the newest ones; where tables end sooner, spread over those that are left."""

    def coming(newest: Tensor) -> Tensor:
        step = torch.arange(count, device=newest.device)
        if end is None:
            return newest[:, None] + 1 + step
        left = (end - 1 - newest).clamp(min=0, max=count)[:, None]
        return (newest[:, None] + 1 + step * left // count).clamp(max=end - 1)

    return coming


def _looked_up(node: Node) -> tuple[Node, Node, int] | None:
    """The table of a look-up, its index, and the dimension of the table that this counts in."""
    given = arguments(node) if node.op == "call_function" and hasattr(node.target, "_schema") else {}
    if node.target is aten.embedding.default:
        return given["weight"], given["indices"], 0
    if node.target is aten.index.Tensor:
        used = [(dim, index) for dim, index in enumerate(given["indices"]) if index is not None]
        return (given["self"], used[0][1], used[0][0]) if len(used) == 1 else None
    if node.target in (aten.gather.default, aten.index_select.default):
        return given["self"], given["index"], given["dim"]
    return None


def _open_dims(node: Node) -> list[int]:
    """The dimensions of a value whose sizes depend on the number of tokens."""
    return [dim for dim, (a, b) in enumerate(zip(size_at(node, 2), size_at(node, 3), strict=True)) if a != b]


def _token_dim(factor: Node, site: AttentionSite) -> int:
    dims = _open_dims(factor)
    if len(dims) != 1 or size_at(factor, 2)[dims[0]] != 2:
        raise refusal(site, f"{factor.name}, by which they are multiplied, has no one value for each position")
    return dims[0]


def as_it_is(queries: Tensor) -> Tensor:
    return queries


def _exchanged(queries: Tensor) -> Tensor:
    return queries.transpose(1, 2)
