"""Cutting a captured graph at its attentions, so that a caller may run them itself and start from any of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.analyses.find_attention import AttentionSite, attention_sites
from xkv_fx.passes.analyses.find_recurrence import recurrence_sites
from xkv_fx.passes.analyses.find_rotation import QueryRotation, find_rotations
from xkv_fx.passes.tools.graph import arguments, at_length, attribute, output_node, placeholders
from xkv_fx.runtime.recurrence import Recurrence

_KNOWN = {"q", "k", "v", "layer", "scale", "sliding_window", "softcap", "sink_logits"}

Recur = Callable[[Recurrence, tuple[Tensor, ...]], Tensor]
"""Runs a layer that mixes tokens by a state, on its inputs `[1, tokens, ...]`."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A value that one segment makes and a later one needs.

    Attributes:
        name: the node's name in the graph that was cut.
        length_dim: the dimension that runs over tokens; None for a tensor without one.
        size: for a whole number, its formula of the number of tokens; None for a tensor.
    """

    name: str
    length_dim: int | None
    size: Any = None

    def size_of(self, tokens: int) -> int:
        """The whole number that stands for this value when the graph runs on so many tokens."""
        return int(at_length(self.size, tokens))


@dataclasses.dataclass(frozen=True)
class Segment:
    """What lies between two attentions: `run(inputs)` returns the tuple `outputs`. Weights are shared.

    Attributes:
        module: the nodes in their order.
        inputs: values of earlier segments, outputs of attentions, or the graph's inputs.
        outputs: values that later segments need, or the following attention.
        recurs: whether layers that mix tokens by a state are among the nodes.
    """

    module: GraphModule
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    recurs: bool = False

    def run(self, inputs: Iterable[Any], recur: Recur | None = None) -> tuple[Tensor, ...]:
        """What the segment computes.

        Args:
            recur: runs the layers that mix tokens by a state; as if `inputs` were a whole prompt when None.
        """
        if recur is None or not self.recurs:
            made: tuple[Tensor, ...] = self.module(*inputs)
        else:
            made = _Recurring(self.module, recur).run(*inputs)
        return made


class _Recurring(Interpreter):
    """Runs a segment with something else in the place of its layers that mix tokens by a state."""

    def __init__(self, module: GraphModule, recur: Recur) -> None:
        super().__init__(module)
        self._recur = recur

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return (
            self._recur(target, args) if isinstance(target, Recurrence) else super().call_function(target, args, kwargs)
        )


@dataclasses.dataclass(frozen=True)
class CutModel:
    """A graph cut at its attentions. Every value that crosses a cut belongs to single tokens, so that tokens of several
    continuations may be laid one behind another: only attention, which the caller runs, mixes them, and layers that mix
    tokens by a state, which the caller may run too.

    Attributes:
        sites: the attentions, in execution order.
        segments: one more than sites; `segments[i]` makes the inputs of attention i, the last one the logits. Where
            layers that mix tokens by a state follow the last attention, there is one more for what comes behind them.
        inputs: names of token ids and position ids.
        logits: name of the logits.
        sink_logits: the sink logits of each attention that has some, by the attention's place among `sites`.
        future_positions: how many positions the means of `rotations` are taken over; None where nobody asked for them.
        rotations: how the queries of each attention are rotated. What they are before is among the segments' outputs.
        max_positions: that the model has; None for any number.
    """

    sites: tuple[AttentionSite, ...]
    segments: tuple[Segment, ...]
    inputs: tuple[str, ...]
    logits: str
    sink_logits: dict[int, Tensor]
    future_positions: int | None = None
    rotations: tuple[QueryRotation, ...] = ()
    max_positions: int | None = None

    @functools.cached_property
    def needed_from(self) -> tuple[frozenset[str], ...]:
        """For each segment, the names of the values that it or a later one needs. What an attention takes from the
        segment before it is not among them; what it borrows from an earlier one is."""
        needed = [frozenset(value.name for value in self.segments[-1].inputs)]
        for at in reversed(range(len(self.segments) - 1)):
            taken = {value.name for value in self.segments[at].inputs}
            if at >= len(self.sites):
                needed.append(needed[-1] | taken)
                continue
            site = self.sites[at]
            if site.borrows:
                taken |= {site.k.name, site.v.name}
            if self.rotations:
                taken.add(self.rotations[at].source.name)
            needed.append(needed[-1] | taken)
        return tuple(reversed(needed))


def cut_at_attention(module: GraphModule, future_positions: int | None = None) -> CutModel:
    """Cut a graph `(input_ids, position_ids)` -> logits `[rows, S, vocabulary]` at its attentions.

    Before: `CleanGraph` has run; one row, S dynamic. The graph itself is not changed.

    Args:
        future_positions: over how many positions a scorer wants mean rotations of queries; None if it wants none.

    Raises:
        UnsupportedModelError: a value crosses a cut that does not belong to single tokens, or an attention has an
            argument that cannot be carried over; or as `find_rotations`.
    """
    graph = module.graph
    sites = attention_sites(module)
    for site in sites:
        unknown = sorted(n for n, value in arguments(site.node).items() if value is not None and n not in _KNOWN)
        if unknown:
            raise UnsupportedModelError(
                f"the attention of layer {site.layer} takes {', '.join(unknown)}, which cannot be cut out of its graph"
            )
    for site in sites:
        if site.form.sink_logits is not None and site.form.sink_logits.op != "get_attr":
            raise UnsupportedModelError(f"the sink logits of layer {site.layer} are computed; they cannot be cut out")
    place = _segment_of(graph, sites)
    output = output_node(graph)
    logits: Node = output.args[0]  # type: ignore[assignment]
    wanted: dict[Node, None] = {logits: None}
    for site in sites:
        wanted |= dict.fromkeys((site.q, site.k, site.v))
    rotations = () if future_positions is None else find_rotations(module, sites, future_positions)
    wanted |= dict.fromkeys(rotation.source for rotation in rotations)
    crossing = {node for node in place if any(place.get(user, -1) > place[node] for user in node.users)}
    segments = []
    for index in range(1 + max(place.values())):
        nodes = [node for node in place if place[node] == index]
        outputs = [node for node in nodes if node in crossing or node in wanted]
        segments.append(_segment(module, nodes, outputs))
    logits_of = {at: site.form.sink_logits for at, site in enumerate(sites) if site.form.sink_logits is not None}
    sink_logits = {at: attribute(module, str(node.target)) for at, node in logits_of.items()}
    return CutModel(
        sites, tuple(segments), tuple(placeholders(graph)), logits.name, sink_logits, future_positions, rotations
    )


def _segment_of(graph: Graph, sites: Sequence[AttentionSite]) -> dict[Node, int]:
    """For each computing node the number of attentions before it, in the graph's order; one more behind the last layer
    that mixes tokens by a state, if no attention follows that."""
    attentions = {site.node for site in sites}
    last = next((node for node in reversed(graph.nodes) if isinstance(node.target, Recurrence)), None)
    place = {}
    passed = 0
    for node in graph.nodes:
        if node in attentions:
            passed += 1
        elif node.op in ("call_function", "call_method", "call_module"):
            place[node] = passed
            passed += node is last and passed == len(sites)
    return place


def _segment(module: GraphModule, nodes: Sequence[Node], outputs: Sequence[Node]) -> Segment:
    inside = set(nodes)
    inputs = dict.fromkeys(
        source for node in nodes for source in node.all_input_nodes if source not in inside and source.op != "get_attr"
    )
    piece = Graph()
    copies: dict[Node, Node] = {}
    for source in inputs:
        copies[source] = piece.placeholder(source.name)
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in copies:
                copies[source] = piece.node_copy(source)
        copies[node] = piece.node_copy(node, copies.__getitem__)
    piece.output(tuple(copies[node] for node in outputs))
    part = GraphModule(module, piece)
    return Segment(part, tuple(map(_value, inputs)), tuple(map(_value, outputs)), bool(recurrence_sites(part)))


def _value(node: Node) -> Value:
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return Value(node.name, None, value.node.expr)
    if not isinstance(value, Tensor):
        raise UnsupportedModelError(f"{node.name} crosses from one layer to the next and is no tensor")
    sizes: tuple[Any, ...] = tuple(value.shape)
    dims = [dim for dim, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
    if len(dims) > 1 or any(not sizes[dim].node.expr.is_Symbol for dim in dims):
        raise UnsupportedModelError(
            f"{node.name}, of the shape {list(value.shape)}, crosses from one layer to the next; it does not belong "
            "to single tokens, so the layers cannot be run again by themselves"
        )
    return Value(node.name, dims[0] if dims else None)
