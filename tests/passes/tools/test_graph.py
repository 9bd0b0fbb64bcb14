"""The helpers that edit graphs: what they add computes what it should, and every fake value stays true."""

from __future__ import annotations

import operator

import pytest
import torch
from graph_checks import assert_meta_is_true, export, graph_of_sum, record
from torch.fx import Graph, GraphModule, Node

from xkv_fx.errors import PassError
from xkv_fx.passes.tools.graph import (
    add_input,
    arguments,
    at_end,
    at_start,
    calls,
    emit,
    fake_mode,
    output_node,
    placeholders,
    propagate,
)
from xkv_fx.runtime import ops  # noqa: F401  (registers the ops)

aten = torch.ops.aten
LENGTHS = (2, 5, 11)


def node_of(module: GraphModule, target: object) -> Node:
    (node,) = calls(module, target)
    return node


def symbolic_length(module: GraphModule) -> torch.SymInt:
    return next(iter(placeholders(module.graph).values())).meta["val"].shape[1]


def test_arguments_gives_every_argument_by_name() -> None:
    graph = Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    node = graph.call_function(torch.ops.xkv.attention.default, (q, k, v, 3, 0.5), {"softcap": 2.0})
    assert arguments(node) == {
        "q": q,
        "k": k,
        "v": v,
        "layer": 3,
        "scale": 0.5,
        "sliding_window": None,
        "softcap": 2.0,
        "sink_logits": None,
        "slopes": None,
        "index_queries": None,
        "index_keys": None,
        "index_weights": None,
        "top_k": None,
    }


def test_calls_come_in_execution_order() -> None:
    module = export(lambda x: (x.exp() + x.sin()).exp(), torch.randn(2, 4))
    assert [node.op for node in calls(module, aten.exp.default)] == ["call_function"] * 2
    first, second = calls(module, aten.exp.default)
    assert first < second
    assert calls(module, aten.cos.default) == []


def test_names_inputs_and_output() -> None:
    module = graph_of_sum()
    assert output_node(module.graph).op == "output"
    inputs = placeholders(module.graph)
    assert len(inputs) == 2
    assert all(name == node.name and node.op == "placeholder" for name, node in inputs.items())
    multiplied = node_of(module, aten.mul.Tensor)
    assert multiplied.op == "call_function"


def test_add_input_comes_last_and_carries_a_fake_value() -> None:
    module = graph_of_sum()
    for name in ("first", "second"):
        add_input(module.graph, name, (2, symbolic_length(module)), torch.int32, torch.device("cpu"))
    assert list(placeholders(module.graph))[2:] == ["first", "second"]
    added = placeholders(module.graph)["second"].meta["val"]
    assert added.dtype == torch.int32
    assert added.fake_mode is fake_mode(module.graph)
    module.recompile()
    x = torch.randn(2, 5, 3)
    mask = torch.zeros(2, 5, dtype=torch.int32)
    torch.testing.assert_close(module(x, x, mask, mask), 3 * x)
    assert_meta_is_true(module, x, x, mask, mask)


@pytest.mark.parametrize("length", LENGTHS)
def test_emit_computes_the_fake_value(length: int) -> None:
    module = graph_of_sum()
    output = output_node(module.graph)
    with at_end(module.graph):
        total = emit(module.graph, aten.cat.default, [output.args[0], output.args[0]], 1, name="twice")
    output.args = (total,)
    module.recompile()
    assert total.name == "twice"
    x, y = torch.randn(2, length, 3), torch.randn(2, length, 3)
    torch.testing.assert_close(module(x, y), torch.cat([2 * x + y] * 2, 1))
    assert_meta_is_true(module, x, y)


def test_propagate_corrects_what_depends_on_a_change_and_nothing_else() -> None:
    module = export(lambda x, y: ((x * 2).exp().sum(2), y.sin()), torch.randn(2, 7, 3), torch.randn(2, 7, 3))
    multiplied, grown, bent = (
        node_of(module, target) for target in (aten.mul.Tensor, aten.exp.default, aten.sin.default)
    )
    before = bent.meta["val"]
    with module.graph.inserting_before(grown):
        first = emit(module.graph, aten.slice.Tensor, multiplied, 1, 0, 1)
    grown.replace_input_with(multiplied, first)
    assert grown.meta["val"].shape[1] == symbolic_length(module), "the test needs a value that is out of date"
    propagate(module.graph, first)
    module.recompile()
    assert bent.meta["val"] is before
    assert grown.meta["val"].shape == (2, 1, 3)
    assert node_of(module, aten.sum.dim_IntList).meta["val"].shape == (2, 1)
    assert_meta_is_true(module, torch.randn(2, 5, 3), torch.randn(2, 5, 3))


def test_insertion_points_are_the_graphs_ends() -> None:
    module = graph_of_sum()
    x = next(iter(placeholders(module.graph).values()))
    with at_start(module.graph):
        early = emit(module.graph, aten.neg.default, x)
        later = emit(module.graph, aten.neg.default, x)
    with at_end(module.graph):
        last = emit(module.graph, aten.neg.default, x)
    nodes = list(module.graph.nodes)
    assert nodes[2:4] == [early, later]
    assert nodes[-2:] == [last, output_node(module.graph)]


def test_a_node_without_a_fake_value_is_named() -> None:
    module = graph_of_sum()
    bare = node_of(module, aten.mul.Tensor)
    del bare.meta["val"]
    with pytest.raises(PassError, match=f"node {bare.name!r} carries no fake value"), at_end(module.graph):
        emit(module.graph, aten.neg.default, bare)


def test_a_graph_without_fake_values_is_refused() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(operator.neg, (x,)))
    with pytest.raises(PassError, match="no fake values"):
        fake_mode(graph)


def test_recorder_sees_what_each_node_computes() -> None:
    module = graph_of_sum()
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    values = record(module, x, y).values
    torch.testing.assert_close(values[node_of(module, aten.mul.Tensor)], 2 * x)


def test_meta_check_notices_a_lie() -> None:
    module = graph_of_sum()
    node = node_of(module, aten.mul.Tensor)
    node.meta["val"] = node.meta["val"][:, :1]
    with pytest.raises(AssertionError):
        assert_meta_is_true(module, torch.randn(2, 4, 3), torch.randn(2, 4, 3))
