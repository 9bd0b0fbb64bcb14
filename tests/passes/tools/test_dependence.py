"""What depends on what: sizes do not count, and an attention can be left out."""

from __future__ import annotations

import torch
from graph_checks import export
from ready_models import captured
from torch import Tensor
from torch.fx import Node

from xkv_fx.passes.analyses.find_attention import attention_sites
from xkv_fx.passes.tools.dependence import ValueFlow, value_inputs
from xkv_fx.passes.tools.graph import placeholders

aten = torch.ops.aten


def shaped_like(x: Tensor) -> Tensor:
    return (torch.zeros_like(x) + 1.0).exp() + x.sin().exp()


def test_every_answer_is_that_of_a_walk() -> None:
    module = captured("llama", 2, 1).prompt
    graph, flow = module.graph, ValueFlow(module.graph)
    attentions = [site.node for site in attention_sites(module)]

    def walk(source: Node, closed: list[Node]) -> set[Node]:
        found = {source}
        for node in graph.nodes:  # inputs come first
            if node not in closed and found.intersection(value_inputs(node)):
                found.add(node)
        return found

    after = {node: walk(node, []) for node in graph.nodes}
    for node in graph.nodes:
        assert flow.dependents([node]) == after[node]
        assert flow.dependents([node], attentions) == walk(node, attentions)
        assert flow.behind([node]) == {other for other in graph.nodes if node in after[other]}
    first, second = list(placeholders(graph).values())[:2]
    assert flow.dependents([first, second]) == flow.dependents([first]) | flow.dependents([second])
    assert flow.behind(attentions) == flow.behind(attentions[:1]) | flow.behind(attentions[1:])


def test_a_tensor_made_to_a_size_does_not_depend_on_the_values() -> None:
    graph = export(shaped_like, torch.zeros(2, 5)).graph
    (x,) = placeholders(graph).values()
    found = {node.target for node in ValueFlow(graph).dependents([x])}
    assert aten.sin.default in found
    assert aten.zeros_like.default not in found
