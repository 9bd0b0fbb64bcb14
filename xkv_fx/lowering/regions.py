"""Cutting a graph at its layers into regions, of which those that are alike become one graph.

A model's layers differ in their weights and in the sizes of their caches only. Both are inputs of a region, the sizes
left open, so that a compiler has to look at a few layers instead of at all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from xkv_fx.lowering.open_sizes import OpenSizes
from xkv_fx.passes.tools.graph import output_node
from xkv_fx.runtime.indexed_ops import INDEXED_DECOMPOSITIONS
from xkv_fx.runtime.plain_forms import PLAIN_FORMS

Made = TypeVar("Made")
# Each call from Python takes a decode step some 20 microseconds, too long to be made for every layer.
TOGETHER = (8, 9, 10, 11, 12)
"""How many layers may make a region."""
OVERHEAD = 150
"""What a region takes to compile besides its nodes, in nodes."""
_OPS = {function: op for op, function in PLAIN_FORMS.items()}
"""Our ops by the functions that stand for them."""


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a graph that is called once or several times.

    Attributes:
        module: takes tensors and returns a tuple of tensors, all with fake values.
        sizes: what is open of its inputs' sizes; None for a whole graph, whose sizes are as they were.
    """

    module: GraphModule
    sizes: OpenSizes | None


@dataclasses.dataclass(frozen=True)
class RegionCall:
    """One call of a region. Values are numbered: the inputs of the whole graph in order, then the results of all calls.

    Attributes:
        region: which one.
        takes: numbers of its inputs.
        gives: number of its first result; the others follow.
        drops: numbers of results that nobody reads after it.
    """

    region: int
    takes: tuple[int, ...]
    gives: int
    drops: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Regions(Generic[Made]):
    """A graph in regions.

    Attributes:
        made: what was made of each different region.
        calls: in the order of the graph.
        output: number of the value that the graph returns.
        values: how many there are.
    """

    made: tuple[Made, ...]
    calls: tuple[RegionCall, ...]
    output: int
    values: int


@dataclasses.dataclass(frozen=True)
class _Read:
    """A value that the layer of that number reads; None for all layers."""

    node: Node
    layer: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Piece:
    """Neighbouring nodes of a graph.

    Attributes:
        layers: them, each layer by itself.
        reads: the values from outside, once for each layer that reads them, since layers of other pieces may not share
            them; those that are changed in place once for all.
        results: what others read of them.
    """

    layers: tuple[tuple[Node, ...], ...]
    reads: tuple[_Read, ...]
    results: tuple[Node, ...]

    @property
    def nodes(self) -> list[Node]:
        return [node for layer in self.layers for node in layer]

    def names(self) -> list[dict[Node, _Read]]:
        """What each layer calls the values that it reads and makes."""
        made = {node: _Read(node, None) for node in self.nodes}
        shared = {read.node: read for read in self.reads if read.layer is None}
        own = [{read.node: read for read in self.reads if read.layer == layer} for layer in range(len(self.layers))]
        return [made | shared | of_layer for of_layer in own]


def whole(module: GraphModule, make: Callable[[Region], Made]) -> Regions[Made]:
    """A graph whose weights are inputs and which returns one tensor, as one region; only its output is changed."""
    output = output_node(module.graph)
    output.args = ((output.args[0],),)
    module.recompile()
    inputs = sum(node.op == "placeholder" for node in module.graph.nodes)
    call = RegionCall(0, tuple(range(inputs)), inputs, ())
    return Regions((make(Region(module, None)),), (call,), inputs, inputs + 1)


def cut_at_layers(
    module: GraphModule, make: Callable[[Region], Made], together: Sequence[int] = TOGETHER
) -> Regions[Made]:
    """The regions of a graph whose weights are inputs and which returns one tensor.

    Args:
        module: not to be used any more.
        make: makes something of a region, such as code. It is called once for all calls that are alike, and again for
            those for which that is not right: something was decided by a size of the others.
        together: how many layers may make a region; the number is taken that leaves least to compile. Where that is no
            less than the whole graph, it is not cut.
    """
    nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    if not all(node.op == "call_function" for node in nodes):
        return whole(module, make)
    bounds = _between_layers(nodes)
    cuts = [_cut(nodes, bounds, layers) for layers in together]
    pieces = min((cut for cut in cuts if all(map(_separate, cut))), key=_work, default=[])
    if not pieces or _work(pieces) >= len(nodes) + OVERHEAD:
        return whole(module, make)
    made: list[Made] = []
    made_for: dict[_Piece, int] = {}
    waiting = list(_kinds(pieces).values())
    while waiting:
        alike = waiting.pop(0)
        region, sizes = _region(alike)
        made_for |= {piece: len(made) for piece in alike}
        made.append(make(region))
        unfit = [piece for call, piece in enumerate(alike) if call and not sizes.fit(call)]
        if unfit:
            waiting.insert(0, unfit)
    return _in_order(module.graph, pieces, made_for, tuple(made))


def _in_order(
    graph: Graph, pieces: Sequence[_Piece], made_for: Mapping[_Piece, int], made: tuple[Made, ...]
) -> Regions[Made]:
    """Number the values of a graph, and call its regions."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output: Any = output_node(graph).args[0]
    numbers = {node: number for number, node in enumerate(inputs)}
    last_reader = {read.node: piece for piece in pieces for read in piece.reads}
    calls = []
    for piece in pieces:
        gives = len(numbers)
        numbers.update((node, gives + offset) for offset, node in enumerate(piece.results))
        takes = tuple(numbers[read.node] for read in piece.reads)
        dead = {read.node for read in piece.reads if last_reader[read.node] is piece and read.node is not output}
        drops = tuple(sorted(numbers[node] for node in dead if node.op != "placeholder"))
        calls.append(RegionCall(made_for[piece], takes, gives, drops))
    return Regions(made, tuple(calls), numbers[output], len(numbers))


def _between_layers(nodes: Sequence[Node]) -> list[int]:
    """Before which nodes each layer begins, and what follows the last; all where the fewest values are still to be
    read. Nothing where there are fewer than three layers."""
    attended = [index for index, node in enumerate(nodes) if writes_cache(node)]
    if len(attended) < 3:
        return []
    alive = _alive(nodes)
    between = [
        min(range(before + 1, after + 1), key=lambda index: (alive[index], -index))
        for before, after in itertools.pairwise(attended)
    ]
    first, end = 2 * between[0] - between[1], 2 * between[-1] - between[-2]
    before = [first] if 0 < first <= attended[0] else []
    behind = [end] if attended[-1] < end < len(nodes) else []
    return [*before, *between, *behind]


def _alive(nodes: Sequence[Node]) -> list[int]:
    """How many results of earlier nodes are read by each node or one behind it."""
    place = {node: index for index, node in enumerate(nodes)}
    changes = [0] * (len(nodes) + 2)
    for index, node in enumerate(nodes):
        changes[index + 1] += 1
        changes[max((place.get(user, len(nodes)) for user in node.users), default=index) + 1] -= 1
    return list(itertools.accumulate(changes))


def writes_cache(node: Node) -> bool:
    """Whether it writes a layer's keys and values, which happens once a layer; what is kept beside them is written by
    ops of its own."""
    op = _op(node)
    return op is not None and op.namespace == "xkv" and op._schema.is_mutable and op not in INDEXED_DECOMPOSITIONS


def _op(node: Node) -> torch._ops.OpOverload | None:
    """The operator that a node calls, or that the function stands for which it calls."""
    op: Any = node.target
    return op if isinstance(op, torch._ops.OpOverload) else _OPS.get(op)


def _cut(nodes: Sequence[Node], bounds: Sequence[int], together: int) -> list[_Piece]:
    """The nodes before the layers, so many layers at a time, and the nodes behind them."""
    layers = [tuple(nodes[start:stop]) for start, stop in itertools.pairwise([0, *bounds, len(nodes)])]
    if len(layers) < 3:
        return [_piece(layers)]
    first, *inner, last = layers
    groups = [inner[start : start + together] for start in range(0, len(inner), together)]
    return [_piece(group) for group in ([first], *groups, [last])]


def _piece(layers: Sequence[tuple[Node, ...]]) -> _Piece:
    inside = {node for layer in layers for node in layer}
    changed = _changed(inside)
    reads: dict[_Read, None] = {}
    for number, layer in enumerate(layers):
        read: list[Node] = []
        map_arg([(node.args, node.kwargs) for node in layer], read.append)
        outside = (node for node in read if node not in inside)
        reads.update(dict.fromkeys(_Read(node, None if node in changed else number) for node in outside))
    results = tuple(node for layer in layers for node in layer if any(user not in inside for user in node.users))
    return _Piece(tuple(layers), tuple(reads), results)


def _changed(nodes: Iterable[Node]) -> set[Node]:
    """What nodes change in place, and what that is a view of."""
    found: set[Node] = set()
    waiting = [node for each in nodes for node in _written(each)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            op = None if node.op == "placeholder" else _op(node)
            waiting += node.all_input_nodes if op is not None and any(map(_aliases, op._schema.returns)) else []
    return found


def _written(node: Node) -> list[Node]:
    op = _op(node)
    if op is None:
        return []
    given = dict(zip((argument.name for argument in op._schema.arguments), node.args, strict=False)) | node.kwargs
    found: list[Node] = []
    map_arg([given.get(argument.name) for argument in op._schema.arguments if argument.is_write], found.append)
    return found


def _aliases(result: torch.Argument) -> bool:
    return result.alias_info is not None


def _separate(piece: _Piece) -> bool:
    """Whether it can be called by itself: it has but tensors of known sizes for inputs and results, none of them of a
    class of its own, and changes nothing in place but inputs of the whole graph, which are no views of each other."""
    return (
        all(_known(node.meta.get("val")) for node in (*(read.node for read in piece.reads), *piece.results))
        and all(node.target is operator.getitem or _op(node) is not None for node in piece.nodes)
        and all(read.node.op == "placeholder" for read in piece.reads if read.layer is None)
    )


def _known(value: Any) -> bool:
    return isinstance(value, FakeTensor) and all(isinstance(size, int) for size in (*value.shape, *value.stride()))


def _kinds(pieces: Sequence[_Piece]) -> dict[Hashable, list[_Piece]]:
    kinds: dict[Hashable, list[_Piece]] = {}
    for piece in pieces:
        kinds.setdefault(_form(piece), []).append(piece)
    return kinds


def _work(pieces: Sequence[_Piece]) -> int:
    """How much there is to compile, in nodes."""
    return sum(len(alike[0].nodes) + OVERHEAD for alike in _kinds(pieces).values())


def _form(piece: _Piece) -> Hashable:
    """What two pieces that are alike have in common."""
    numbers = {read: number for number, read in enumerate((*piece.reads, *(_Read(node, None) for node in piece.nodes)))}
    named = [{node: numbers[read] for node, read in names.items()} for names in piece.names()]
    return (
        tuple(_kind_of(read.node.meta["val"]) for read in piece.reads),
        tuple(
            (node.target, _frozen(node.args, names), _frozen(node.kwargs, names))
            for layer, names in zip(piece.layers, named, strict=True)
            for node in layer
        ),
        tuple(named[0][node] for node in piece.results),
    )


def _kind_of(value: torch.Tensor) -> Hashable:
    """All about a tensor but sizes and strides. Compilers take 0 and 1 for no sizes like others."""
    sizes = tuple(None if size > 1 else size for size in (*value.shape, *value.stride()))
    return value.dtype, value.device, value.dim(), sizes


def _frozen(value: Any, names: Mapping[Node, int]) -> Hashable:
    """Arguments of a node as a key; equal numbers of different types are different."""
    if isinstance(value, Node):
        return "node", names[value]
    if isinstance(value, (tuple, list)):
        return type(value).__name__, tuple(_frozen(each, names) for each in value)
    if isinstance(value, dict):
        return "dict", tuple((key, _frozen(each, names)) for key, each in value.items())
    if isinstance(value, slice):
        return "slice", _frozen((value.start, value.stop, value.step), names)
    return type(value).__name__, repr(value) if isinstance(value, float) else value


def _region(alike: Sequence[_Piece]) -> tuple[Region, OpenSizes]:
    first, sizes, graph = alike[0], OpenSizes(), Graph()
    copies: dict[_Read, Node] = {}
    for number, same in enumerate(zip(*(piece.reads for piece in alike), strict=True)):
        copies[same[0]] = graph.placeholder(f"input_{number}")
        copies[same[0]].meta["val"] = sizes.opened([read.node.meta["val"] for read in same])
    for layer, names in zip(first.layers, first.names(), strict=True):
        _copy_layer(layer, names, graph, copies)
    graph.output(tuple(copies[_Read(node, None)] for node in first.results))
    return Region(GraphModule(torch.nn.Module(), graph), sizes), sizes


def _copy_layer(layer: Sequence[Node], names: Mapping[Node, _Read], graph: Graph, copies: dict[_Read, Node]) -> None:
    def copied(node: Node) -> Node:
        return copies[names[node]]

    for node in layer:
        copies[names[node]] = graph.node_copy(node, copied)
