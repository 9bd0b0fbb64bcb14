"""Cleaning: what nobody needs is gone, and the graph computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from graph_checks import assert_meta_is_true, export
from tiny_models import llama, random_ids
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from xkv_fx.capture.export import uncleaned_graph
from xkv_fx.hf.attention_entry import NAME
from xkv_fx.hf.inspect import read_model
from xkv_fx.hf.shadow import shadow
from xkv_fx.passes.prepare.clean_graph import CHECKS, CleanGraph
from xkv_fx.passes.tools.graph import calls

aten = torch.ops.aten


def is_idle_cast(node: Node) -> bool:
    """Whether a node gives a tensor the dtype and place that it has already."""
    if node.op != "call_function" or getattr(node.target, "overloadpacket", None) is not aten.to:
        return False
    source = node.args[0]
    assert isinstance(source, Node)
    before, after = source.meta["val"], node.meta["val"]
    return before.dtype == after.dtype and before.device == after.device


def cleaned(module: GraphModule) -> GraphModule:
    CleanGraph()(module)
    return module


def prompt_inputs(length: int = 9) -> tuple[Tensor, Tensor]:
    return random_ids(2, length), torch.arange(length).expand(2, -1)


class Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = shadow(*read_model(llama(2)), NAME)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits


@pytest.fixture(scope="module")
def exported() -> GraphModule:
    """A model's graph as `torch.export` leaves it; a captured one is clean already."""
    return uncleaned_graph(Exported(), prompt_inputs())[0]


@pytest.fixture
def graph(exported: GraphModule) -> GraphModule:
    """A copy of it for each test to clean."""
    return GraphModule(exported, copy.deepcopy(exported.graph))


def test_logits_stay_the_same_to_the_bit(graph: GraphModule) -> None:
    inputs = prompt_inputs()
    with torch.no_grad():
        before = graph(*inputs)
        after = cleaned(graph)(*inputs)
    assert torch.equal(before, after)
    assert_meta_is_true(graph, *inputs)


def test_checks_and_dead_code_are_gone(graph: GraphModule) -> None:
    assert any(calls(graph, check) for check in CHECKS), "the test needs a graph with something to remove"
    before = len(graph.graph.nodes)
    record = CleanGraph()(graph)
    assert not any(calls(graph, check) for check in CHECKS)
    assert not [node for node in graph.graph.nodes if node.op == "call_module"]
    assert not [node for node in graph.graph.nodes if node.op == "call_function" and not node.users]
    assert record.name == "clean_graph"
    assert (record.matched, record.changed) == (before, before - len(graph.graph.nodes))
    assert record.changed > 0


def test_idle_casts_are_gone(graph: GraphModule) -> None:
    cleaned(graph)
    assert not [node.format_node() for node in graph.graph.nodes if is_idle_cast(node)]


def test_each_weight_stands_before_its_first_use(graph: GraphModule) -> None:
    cleaned(graph)
    order = list(graph.graph.nodes)
    weights = [node for node in order if node.op == "get_attr"]
    assert weights
    for node in weights:
        following = order[order.index(node) + 1 :]
        assert next(other for other in following if other.op != "get_attr") in node.users


def test_cleaning_twice_changes_nothing(graph: GraphModule) -> None:
    cleaned(graph)
    code = graph.code
    record = CleanGraph()(graph)
    assert record.changed == 0
    assert graph.code == code


def test_what_does_something_stays() -> None:
    def function(x: Tensor) -> Tensor:
        wide = x.to(torch.float64)
        dropped = torch.nn.functional.dropout(wide, 0.5, training=False)
        same = dropped.to(torch.float64).detach()
        return same.to(torch.float32) * 2

    module = export(function, torch.randn(2, 5))
    x = torch.randn(2, 7)
    before = module(x)
    cleaned(module)
    assert torch.equal(module(x), before)
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert targets == [aten.to.dtype, aten.to.dtype, aten.mul.Tensor]


def test_dropout_in_training_stays() -> None:
    module = export(lambda x: torch.nn.functional.dropout(x, 0.5, training=True), torch.randn(2, 5))
    cleaned(module)
    assert calls(module, aten.dropout.default)
