"""Finding how positions turn an attention's queries, for scorers that ask what queries to come will look like.

A rotary embedding, in whatever layout, takes the queries of a layer and multiplies each head's query of each token by a
matrix that depends on the token's position alone:

    queries -> ... (sums, parts, products with what is made from position_ids) ... -> q of xkv::attention

Found is where that part of the graph begins. From a copy of it, which is run on the unit vectors, the mean of these
matrices over coming positions is made.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.dependence import READ_SIZES, Evaluation, behind, dependents, size_at, value_inputs
from xkv_fx.passes.find_attention import AttentionSite
from xkv_fx.passes.graph import arguments, at_length, emit, graft, inline, named, placeholders
from xkv_fx.runtime.scorers import Scorer, future_positions

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)
# These put the elements of what they are given in other places.
MOVES = (
    *CASTS,
    aten.alias.default,
    aten.cat.default,
    aten.chunk.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.flip.default,
    aten.movedim.int,
    aten.narrow.default,
    aten.permute.default,
    aten.reshape.default,
    aten.reshape_as.default,
    aten.roll.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.stack.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten.view_as.default,
    aten.view_as_complex.default,
    aten.view_as_real.default,
    operator.getitem,
)
SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.neg.default)
PROJECTIONS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.conv1d.default,
)
PROBED = 3


@dataclasses.dataclass(frozen=True)
class QueryRotation:
    """How positions turn the queries of one attention.

    Attributes:
        source: the node whose value the queries are before that.
        arrange: brings that value to `[rows, query_heads, S, dim]`.
        mean: `mean(newest)`, int64 `[rows]` -> float `[rows, dim, key_dim]`: what queries are multiplied by from the
            right, the mean over the positions behind each row's newest one. None where positions do not turn them.
    """

    source: Node
    arrange: Callable[[Tensor], Tensor]
    mean: GraphModule | None


def find_rotations(module: GraphModule, sites: Sequence[AttentionSite], count: int) -> tuple[QueryRotation, ...]:
    """How the queries of each attention are turned, its mean taken over `count` positions. The graph is not changed.

    Layers that are turned alike share one `mean`.

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
                    newest = inline(graph, _newest, positions, named(graph, "length"), name="newest_position")
                means[piece] = graft(graph, piece.graph, newest)
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
        self.module = module
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.positions = _positions(graph)
        self.tokens = dependents(graph, list(placeholders(graph).values())[:1])
        # An attention mixes tokens of all positions; what comes out of it belongs to none of them.
        attentions = [site.node for site in sites]
        self.placed = set() if self.positions is None else dependents(graph, [self.positions], attentions)
        self.sizes = {node: node.meta["val"].node.expr for node in graph.nodes if _is_size(node)}
        self._factors: dict[Node, int] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._means: dict[int, GraphModule] = {}

    def rotation(self, site: AttentionSite, count: int) -> QueryRotation:
        q = site.q
        if self._factors_of(q) == 0:
            self._check_unturned(site, q)
            return QueryRotation(q, _as_it_is, None)
        if self._factors_of(q) > 1:
            raise _refusal(site, "they are multiplied by something of their positions twice")
        source, turn = self._turn(site)
        self._check_unturned(site, source)
        found = _Turn(self, site, source, turn)
        kind = self._kind(site.q, {source: self._number(("source", source.meta["val"].dtype, found.layout))})
        if kind not in self._means:
            found.prove()
            self._means[kind] = found.mean(count)
        return QueryRotation(source, found.arrange, self._means[kind])

    def _kind(self, node: Node, known: dict[Node, int]) -> int:
        """A number that is the same for values that are computed alike, from the very same tensors."""
        if node in known:
            return known[node]
        if node in self.sizes:
            kind: tuple[Any, ...] = ("size", str(self.sizes[node]))
        else:
            parts = map_arg((node.args, node.kwargs), lambda source: f"%{self._kind(source, known)}")
            kind = (node.op, str(node.target), "" if node is self.positions else str(parts))
        known[node] = self._number(kind)
        return known[node]

    def _number(self, kind: tuple[Any, ...]) -> int:
        return self._numbers.setdefault(kind, len(self._numbers))

    def _factors_of(self, node: Node) -> int:
        """How many factors that are made from positions a linear map behind a node's value has at most; 0 where its
        last part that is no linear map has no such factor behind it."""
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
        if node.target in MOVES and not (node.target in CASTS and _is_whole(node)):
            return operands, None
        return nothing

    def _turn(self, site: AttentionSite) -> tuple[Node, set[Node]]:
        """The one node that q is a linear map of by factors of positions, and the nodes of that map."""
        turn: set[Node] = set()
        sources: set[Node] = set()
        stack = [site.q]
        while stack:
            node = stack.pop()
            turn.add(node)
            for operand in self.linear(node)[0]:
                if self._factors_of(operand) == 0:
                    sources.add(operand)
                elif operand not in turn:
                    stack.append(operand)
        while len(sources) > 1 or any(map(_is_list, sources)):  # parts of one tensor, of which some are not turned
            last = max(sources, key=self.order.__getitem__)
            operands, _ = self.linear(last)
            if not operands:
                raise _refusal(site, f"they are put together from several values, {last.name} among them")
            sources.remove(last)
            sources.update(operands)
            turn.add(last)
        (source,) = sources
        return source, turn

    def _check_unturned(self, site: AttentionSite, source: Node) -> None:
        """Positions may be part of the hidden state, but must not enter between the projection that makes queries and
        `source`."""
        stack, known = [source], {source}
        while stack:
            node = stack.pop()
            if node not in self.placed:
                continue
            operands = [source for source in value_inputs(node) if not _is_size(source)]
            if any(operand in self.placed and operand not in self.tokens for operand in operands):
                raise _refusal(site, f"positions enter them in {node.name}, by what is not known to be a linear map")
            if node.target in PROJECTIONS:
                continue
            for operand in operands:
                if operand not in known:
                    known.add(operand)
                    stack.append(operand)

    def at(self, positions: Tensor, given: dict[Node, Tensor]) -> Evaluation:
        """Values of the graph at given positions `[rows, tokens]`."""
        sizes = {node: int(at_length(size, positions.shape[1])) for node, size in self.sizes.items()}
        return Evaluation(self.module, {**sizes, self.positions: positions, **given})  # type: ignore[dict-item]


class _Turn:
    """The linear map between a layer's queries as they are projected and as they are turned."""

    def __init__(self, finder: _Finder, site: AttentionSite, source: Node, nodes: set[Node]) -> None:
        self.finder, self.site, self.source = finder, site, source
        self.nodes = sorted(nodes, key=finder.order.__getitem__)
        self.factors = list(
            dict.fromkeys(factor for node in self.nodes if (factor := finder.linear(node)[1]) in finder.placed)
        )
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
        finder, piece = self.finder, Graph()
        newest = piece.placeholder("newest")
        device = self.source.meta["val"].device
        with self.source.meta["val"].fake_mode:
            newest.meta["val"] = torch.empty(self.rows, dtype=torch.int64, device=device)
        coming: dict[Node, Any] = {finder.positions: inline(piece, _coming(count, self.end), newest)}  # type: ignore[dict-item]
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
        return GraphModule(finder.module, piece)

    def _copy(self, piece: Graph, node: Node, known: dict[Node, Any], tokens: int) -> Any:
        """A copy in `piece` of a node and of what it is made from, for so many tokens; `known` are copies there are."""
        finder = self.finder
        needed, stack = {node} - known.keys(), [node]
        while stack:
            each = stack.pop()
            for source in () if each in finder.sizes else each.all_input_nodes:
                if source not in needed and source not in known:
                    needed.add(source)
                    stack.append(source)
        for each in sorted(needed, key=finder.order.__getitem__):
            if each in finder.sizes:
                known[each] = int(at_length(finder.sizes[each], tokens))
            elif each.op == "get_attr":
                known[each] = piece.get_attr(str(each.target))
                known[each].meta["val"] = each.meta["val"]
            elif each.op == "call_function":
                args, kwargs = map_arg(each.args, known.__getitem__), map_arg(each.kwargs, known.__getitem__)
                known[each] = emit(piece, each.target, *args, **kwargs)  # type: ignore[arg-type]
            else:
                raise _refusal(self.site, f"what turns them is made from the input {each.name} too")
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
        got = self.finder.at(positions, {self.source: queries}).value(self.site.q)
        with torch.no_grad():
            at_each = torch.stack([self.mean(1)(newest + step) for step in range(PROBED)], 1)
            error = (self.mean(PROBED)(newest) - at_each.mean(1)).abs().max()
            turned = torch.matmul(self.arrange(queries).to(at_each.dtype)[:, :, :, None], at_each[:, None])[:, :, :, 0]
            error = torch.maximum(error, (turned - got).abs().max())
        limit = 16 * torch.finfo(got.dtype).eps * max(1.0, float(got.abs().max()))
        if not float(error) <= limit:
            raise _refusal(self.site, "positions do not turn each head's query by the same matrix")

    def _arrangement(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """What brings the source to `[rows, heads, S, dim]`, and back."""
        heads = self.heads
        shape, longer = size_at(self.source, 2), size_at(self.source, 3)
        open_dims = [dim for dim, (a, b) in enumerate(zip(shape, longer, strict=True)) if a != b]
        if shape[0] == self.rows and len(open_dims) == 1 and shape[open_dims[0]] == 2:
            if len(shape) == 4 and open_dims == [2] and shape[1] == heads:
                return _as_it_is, _as_it_is
            if len(shape) == 4 and open_dims == [1] and shape[2] == heads:
                return _exchanged, _exchanged
            if len(shape) == 3 and open_dims == [1] and shape[2] % heads == 0:
                return (
                    lambda source: source.unflatten(2, (heads, -1)).transpose(1, 2),
                    lambda queries: queries.transpose(1, 2).flatten(2),
                )
        raise _refusal(self.site, f"{self.source.name}, of shape {list(shape)} for two tokens, does not show the heads")

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
        finder, ends = self.finder, []
        for node in behind(finder.module.graph, self.factors) & finder.placed:
            found = _looked_up(node)
            if found is None or found[1] not in finder.placed:
                continue
            table, index, dim = found
            positions = torch.arange(2, device=self.source.meta["val"].device).expand(self.rows, -1)
            first = int(finder.at(positions, {}).value(index).min())
            ends.append(int(table.meta["val"].shape[dim]) - first)
        return min(ends, default=None)


def _refusal(site: AttentionSite, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"what positions do to the queries of layer {site.layer} cannot be told: {why}. Choose a scorer that does not "
        "need unrotated queries"
    )


def _positions(graph: Graph) -> Node | None:
    """The position ids that the model sees, those that `CompactPadding` moved if it has run; None if it uses none."""
    inputs = placeholders(graph)
    positions = list(inputs.values())[1]
    if "valid" not in inputs:
        return positions
    return next((user for user in positions.users if user.target not in READ_SIZES), None)


def _newest(positions: Tensor, length: Tensor) -> Tensor:
    return positions.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0]


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


def _token_dim(factor: Node, site: AttentionSite) -> int:
    shape, longer = size_at(factor, 2), size_at(factor, 3)
    dims = [dim for dim, (a, b) in enumerate(zip(shape, longer, strict=True)) if a != b]
    if len(dims) != 1 or shape[dims[0]] != 2:
        raise _refusal(site, f"{factor.name}, by which they are multiplied, has no one value for each position")
    return dims[0]


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _is_list(node: Node) -> bool:
    return isinstance(node.meta.get("val"), list | tuple)


def _is_whole(node: Node) -> bool:
    value = node.meta["val"]
    return not (value.is_floating_point() or value.is_complex())


def _as_it_is(queries: Tensor) -> Tensor:
    return queries


def _exchanged(queries: Tensor) -> Tensor:
    return queries.transpose(1, 2)
