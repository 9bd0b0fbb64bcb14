"""The graph of one token, made from the graph of a prompt: every size in it becomes a number."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.fx import GraphModule, Node

from xkv_fx.passes.prepare.clean_graph import CleanGraph
from xkv_fx.passes.tools.graph import fake_mode, placeholders, run_fake


def one_token_graph(prompt: GraphModule, rows: int) -> GraphModule:
    """A copy of a prompt graph for one token a row, all shapes static; its weights are the very same tensors.

    Args:
        prompt: a graph of `(input_ids, position_ids)` `[rows, S]`.
    """
    module = GraphModule(prompt, copy.deepcopy(prompt.graph))
    CleanGraph().rewrite(module)
    graph = module.graph
    for node in placeholders(graph).values():
        with fake_mode(graph):
            node.meta["val"] = torch.empty(rows, 1, dtype=torch.int64, device=node.meta["val"].device)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        value = run_fake(graph, node.target, node.args, node.kwargs)
        if isinstance(value, int | float | bool | torch.SymInt):
            _put_number(node, value)
        else:
            node.meta["val"] = value
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def _put_number(node: Node, value: Any) -> None:
    number = int(value) if isinstance(value, torch.SymInt) else value

    def put(argument: Any) -> Any:
        return number if argument is node else argument

    for user in list(node.users):
        user.args = torch.fx.node.map_aggregate(user.args, put)
        user.kwargs = torch.fx.node.map_aggregate(user.kwargs, put)
    node.graph.erase_node(node)
