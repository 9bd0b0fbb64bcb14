"""What depends on what: sizes do not count, an attention can be left out, and an edit counts at once."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from graph_checks import export
from ready_models import captured
from torch import Tensor
from torch.fx import Graph

from xkv_fx.passes.analyses.find_attention import attention_sites
from xkv_fx.passes.tools.dependence import behind, dependents, value_inputs
from xkv_fx.passes.tools.graph import calls, output_node, placeholders

aten = torch.ops.aten


def shaped_like(x: Tensor) -> Tensor:
    return (torch.zeros_like(x) + 1.0).exp() + x.sin().exp()


def as_networkx(graph: Graph) -> nx.DiGraph:
    flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((source, node) for node in graph.nodes for source in value_inputs(node))
    return flow


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_every_answer_is_that_of_networkx(family: str) -> None:
    module = captured(family, 2, 1).prompt
    graph, flow = module.graph, as_networkx(module.graph)
    attentions = [site.node for site in attention_sites(module)]
    around = flow.copy()
    around.remove_nodes_from(attentions)
    for node in graph.nodes:
        assert behind([node]) == {node} | nx.ancestors(flow, node)
        assert dependents(graph, [node]) == {node} | nx.descendants(flow, node)
        if node not in attentions:
            assert dependents(graph, [node], attentions) == {node} | nx.descendants(around, node)
    first, second = list(placeholders(graph).values())[:2]
    assert dependents(graph, [first, second]) == dependents(graph, [first]) | dependents(graph, [second])
    assert behind(attentions) == behind(attentions[:1]) | behind(attentions[1:])


def test_a_tensor_made_to_a_size_does_not_depend_on_the_values() -> None:
    graph = export(shaped_like, torch.zeros(2, 5)).graph
    (x,) = placeholders(graph).values()
    found = {node.target for node in dependents(graph, [x])}
    assert aten.sin.default in found
    assert aten.zeros_like.default not in found


def test_an_edit_counts_at_once() -> None:
    module = export(shaped_like, torch.zeros(2, 5))
    (x,), output = placeholders(module.graph).values(), output_node(module.graph)
    made_to_size = calls(module, aten.exp.default)[0]
    assert x not in behind([made_to_size])
    assert made_to_size not in dependents(module.graph, [x])
    made_to_size.args = (calls(module, aten.sin.default)[0],)
    sine = made_to_size.args[0]
    sine.append(made_to_size)  # type: ignore[union-attr]
    assert x in behind([made_to_size])
    assert {made_to_size, output} <= dependents(module.graph, [x])
