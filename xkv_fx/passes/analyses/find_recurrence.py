"""Finding the layers of a captured graph that mix tokens by a state of fixed size."""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule, Node

from xkv_fx.runtime.recurrence import Recurrence


@dataclasses.dataclass(frozen=True)
class RecurrenceSite:
    """One call of such a layer.

    Attributes:
        node: itself.
        recurrence: the layer.
        inputs: what it is given.
    """

    node: Node
    recurrence: Recurrence
    inputs: tuple[Node, ...]


def recurrence_sites(module: GraphModule) -> tuple[RecurrenceSite, ...]:
    """These layers in execution order; none in a model of attention alone."""
    return tuple(
        RecurrenceSite(node, node.target, tuple(node.all_input_nodes))
        for node in module.graph.nodes
        if node.op == "call_function" and isinstance(node.target, Recurrence)
    )
