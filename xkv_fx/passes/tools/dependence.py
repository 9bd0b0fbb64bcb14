"""What depends on what in a captured graph, and what a part of it computes.

A node that reads only a tensor's size does not depend on its values: masks and positions are made from sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import networkx as nx
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from xkv_fx.errors import PassError
from xkv_fx.passes.tools.graph import at_length, attribute

aten = torch.ops.aten
# These read the size, dtype and device of their first argument, and nothing of its values; those their second.
READ_SIZES = (
    aten.sym_size.int,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten._assert_tensor_metadata.default,
)
SIZED_LIKE = (aten.expand_as.default, aten.view_as.default, aten.type_as.default, aten.reshape_as.default)
# Numbers of tokens at which `Evaluation` shows what a graph makes of their number alone, beside the longest.
SHORT_LENGTHS = (2, 3, 17)


def value_inputs(node: Node) -> list[Node]:
    """The inputs of a node whose values it reads."""
    unread = node.args[0] if node.target in READ_SIZES else node.args[1] if node.target in SIZED_LIKE else None
    return [source for source in node.all_input_nodes if source is not unread]


class ValueFlow:
    """Who reads whose values, as a `networkx.DiGraph` of the nodes; of a graph as it is when this is made.

    An analysis makes one and asks it as often as it likes. What a pass adds afterwards is not in it.
    """

    def __init__(self, graph: Graph) -> None:
        self._flow: Any = nx.DiGraph()
        self._flow.add_nodes_from(graph.nodes)
        self._flow.add_edges_from((source, node) for node in graph.nodes for source in value_inputs(node))

    def dependents(self, sources: Iterable[Node], except_through: Iterable[Node] = ()) -> set[Node]:
        """Every node whose value depends on those of `sources`, these included, not only through `except_through`."""
        found, closed = set(sources), set(except_through)
        flow = nx.restricted_view(self._flow, closed - found, ()) if closed else self._flow
        return found.union(*(nx.descendants(flow, source) for source in found))

    def behind(self, nodes: Iterable[Node]) -> set[Node]:
        """These nodes and all whose values they depend on."""
        found = set(nodes)
        return found.union(*(nx.ancestors(self._flow, node) for node in found))


class Evaluation:
    """Computes single nodes of a graph from given values of others, each of them once.

    Raises:
        PassError: a value is asked for that depends on an input that was not given.
    """

    def __init__(self, module: GraphModule, given: Mapping[Node, Any]) -> None:
        self.module = module
        self.values: dict[Node, Any] = dict(given)
        self.order = {node: place for place, node in enumerate(module.graph.nodes)}

    def value(self, node: Node) -> Any:
        """What `node` computes."""
        if node in self.values:
            return self.values[node]
        needed, stack = {node}, [node]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in needed and source not in self.values:
                    needed.add(source)
                    stack.append(source)
        with torch.no_grad():
            for each in sorted(needed - self.values.keys(), key=self.order.__getitem__):
                self.values[each] = self.run(each, {})
        return self.values[node]

    def run(self, node: Node, instead: Mapping[Node, Any]) -> Any:
        """What a node computes with other values for some of its inputs."""
        if node.op == "get_attr":
            return attribute(self.module, str(node.target))
        if node.op != "call_function":
            raise PassError(f"{node.name} is not given")

        def value(source: Node) -> Any:
            return instead[source] if source in instead else self.value(source)

        args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]


def size_at(node: Node, length: int) -> tuple[int, ...]:
    """The shape of a node's tensor when a row has `length` tokens."""

    return tuple(
        int(at_length(dim.node.expr, length)) if isinstance(dim, torch.SymInt) else dim
        for dim in node.meta["val"].shape
    )
