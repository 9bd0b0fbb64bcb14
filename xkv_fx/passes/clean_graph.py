"""Removing what capture leaves behind and nobody needs."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

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
        graph.eliminate_dead_code()
        for node in list(graph.nodes):
            if node.op == "get_attr":
                min(node.users).prepend(node)
        return PassRecord(self.name, before, before - len(graph.nodes))


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
