"""Returning new states instead of changed copies of old ones."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.graph import output_node, placeholders

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class ReturnStates(GraphPass):
    """Before: the graph of one token of a layer that mixes tokens by a state, which copies the states that it is given
    and changes the copies, as its code in transformers does. After: where a copy is overwritten as a whole, and not
    read again, nothing is copied, and what it was overwritten with is returned.

        held = clone(state); ... held ...; return copy_(held, new)  ->  ... state ...; return new
    """

    name: ClassVar[str] = "return_states"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        output = output_node(graph)
        returned: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        order = {node: place for place, node in enumerate(graph.nodes)}
        given = set(placeholders(graph).values())
        changed = 0
        for place, node in enumerate(returned):
            held = _overwritten(node, given)
            if held is None or any(order[reader] > order[node] for reader in _readers(held)):
                continue
            returned[place] = node.args[1]
            output.args = (tuple(returned),)
            graph.erase_node(node)
            held.replace_all_uses_with(held.args[0])  # type: ignore[arg-type]
            graph.erase_node(held)
            changed += 1
        return PassRecord(self.name, len(returned), changed)


def _overwritten(node: Node, given: set[Node]) -> Node | None:
    """The copy of an input that a node overwrites as a whole, for the output alone, with a tensor of the same shape and
    dtype that shares no memory with an input; None for another node."""
    if node.target is not aten.copy_.default or len(node.users) != 1:
        return None
    held, new = node.args[:2]
    if not isinstance(held, Node) or not isinstance(new, Node) or held.target is not aten.clone.default:
        return None
    one, other, source = held.meta["val"], new.meta["val"], _viewed(new)
    own = source not in given and source.target is not aten.clone.default
    same = one.shape == other.shape and one.dtype == other.dtype
    return held if own and same and held.args[0] in given else None


def _readers(node: Node) -> set[Node]:
    """All nodes that read a tensor, by itself or through views of it."""
    found = set(node.users)
    return found.union(*(_readers(user) for user in node.users if _is_view(user)))


def _viewed(node: Node) -> Node:
    """The node that made the memory which a view looks at."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _is_view(node: Node) -> bool:
    """Whether what a node returns may share memory with its first argument, which it does not change."""
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and any(part.alias_info for part in schema.returns)
