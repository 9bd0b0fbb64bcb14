"""Turning the weights of a graph into its first inputs, so that compiled code holds no copy of them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xkv_fx.passes.tools.graph import attribute


def lift_weights(module: GraphModule) -> tuple[GraphModule, dict[str, Tensor]]:
    """A copy of `module` that takes its weights before its other inputs, and these weights by their names in `module`,
    in the order in which it takes them, not copied."""
    graph = copy.deepcopy(module.graph)
    first = next(iter(graph.nodes))
    inputs: dict[str, Node] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        target = str(node.target)
        if target not in inputs:
            with graph.inserting_before(first):
                inputs[target] = graph.placeholder("weight_" + target.replace(".", "_"))
            inputs[target].meta.update(node.meta)
        node.replace_all_uses_with(inputs[target])
        graph.erase_node(node)
    weights = {target: attribute(module, target) for target in inputs}
    lifted = GraphModule(torch.nn.Module(), graph)
    return lifted, weights
