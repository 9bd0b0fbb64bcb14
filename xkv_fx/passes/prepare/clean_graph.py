"""Removing what capture leaves behind and nobody needs."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from xkv_fx.passes.base import GraphPass, PassRecord

aten = torch.ops.aten
CHECKS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default)
NO_OPS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.detach.default,
    aten.alias.default,
    aten.dropout.default,
)


@dataclasses.dataclass(frozen=True)
class CleanGraph(GraphPass):
    """Before: a graph as `torch.export` leaves it. After: no assertions, no casts that change nothing, no dead code,
    and each weight named where it is first used."""

    name: ClassVar[str] = "clean_graph"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        before = len(graph.nodes)
        for node in list(graph.nodes):
            if node.op != "call_function":
                if node.op == "call_module" and not node.users:  # the guards that torch.export adds
                    graph.erase_node(node)
            elif node.target in CHECKS and not node.users:
                graph.erase_node(node)
            elif node.target in NO_OPS and _changes_nothing(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        remove_dead_code(graph)
        for node in list(graph.nodes):
            if node.op == "get_attr":
                min(node.users).prepend(node)
        return PassRecord(self.name, before, before - len(graph.nodes))


def remove_dead_code(graph: Graph) -> None:
    """As `Graph.eliminate_dead_code`, but also removes ops that change in place a tensor that nothing else reads."""
    graph.eliminate_dead_code()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and _changes_only_its_own(node):
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _changes_only_its_own(node: Node) -> bool:
    """Whether what a node returns is new, or is a new tensor that it alone has been given and changes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or len(schema.returns) != 1:
        return False
    if schema.returns[0].alias_info is None:
        return not schema.is_mutable
    source = node.args[0]
    written = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    if not isinstance(source, Node) or source.op != "call_function" or written != [schema.arguments[0].name]:
        return False
    return set(source.users) <= {node} and _changes_only_its_own(source)


def _changes_nothing(node: Node) -> bool:
    source = node.args[0]
    if not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if node.target is aten.dropout.default:
        return node.args[2] is False
    return before.dtype == after.dtype and before.device == after.device and before.layout == after.layout
