"""Functions that become a part of a graph: it computes what they do, and every fake value is true."""

from __future__ import annotations

import pytest
import torch
from graph_checks import assert_meta_is_true, doubled_plus, export, graph_of_sum
from torch import Tensor

from xkv_fx.errors import PassError
from xkv_fx.passes.tools.graph import at_end, at_start, output_node, placeholders
from xkv_fx.passes.tools.inline import inline

aten = torch.ops.aten
LENGTHS = (2, 5, 11)


def centre(x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    mean = x.mean(1, keepdim=True)
    order = torch.arange(x.shape[1])[None, :, None] + torch.zeros_like(y)
    return x - mean, {"order": order, "none": y}


@pytest.mark.parametrize("length", LENGTHS)
def test_inline_adds_the_ops_of_a_function_in_its_own_structure(length: int) -> None:
    module = graph_of_sum()
    x, y = placeholders(module.graph).values()
    output = output_node(module.graph)
    with at_start(module.graph):
        centred, others = inline(module.graph, centre, x, y)
    assert others["none"] is y
    output.args = ((output.args[0], centred, others["order"]),)
    module.graph.lint()
    module.recompile()
    assert all("val" in node.meta for node in module.graph.nodes if node.op == "call_function")
    real = torch.randn(2, length, 3), torch.randn(2, length, 3)
    expected = doubled_plus(*real), centre(*real)[0], centre(*real)[1]["order"]
    for got, want in zip(module(*real), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert_meta_is_true(module, *real)


def test_inline_names_a_single_result() -> None:
    module = graph_of_sum()
    x = next(iter(placeholders(module.graph).values()))
    with at_end(module.graph):
        node = inline(module.graph, torch.exp, x, name="grown")
    assert node.name == "grown"
    assert node.target is aten.exp.default
    assert "grown" in module.graph.python_code("self").src


@pytest.mark.parametrize("length", LENGTHS)
def test_inline_computes_sizes_from_those_of_its_inputs(length: int) -> None:
    def once_more(x: Tensor, y: Tensor) -> Tensor:
        lengths = x.shape[1] + y.shape[1] - 1, 3 * y.shape[1]
        return x.new_zeros(lengths)

    module = export(doubled_plus, torch.randn(2, 7, 3), torch.randn(2, 7, 3))
    output = output_node(module.graph)
    with at_end(module.graph):
        zeros = inline(module.graph, once_more, *placeholders(module.graph).values())
    output.args = ((output.args[0], zeros),)
    module.recompile()
    real = torch.randn(2, length, 3), torch.randn(2, length, 3)
    assert module(*real)[1].shape == once_more(*real).shape
    assert_meta_is_true(module, *real)


def test_inline_gives_each_of_several_results_its_node_and_follows_changes_in_place() -> None:
    def halves(x: Tensor, y: Tensor) -> Tensor:
        first, second = (x + y).chunk(2, 2)
        return first.mul_(second).sub_(1)

    module = export(lambda x, y: x.exp() + y.exp(), torch.randn(2, 7, 4), torch.randn(2, 7, 4))
    output = output_node(module.graph)
    with at_end(module.graph):
        output.args = (inline(module.graph, halves, *placeholders(module.graph).values()),)
    module.recompile()
    real = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    torch.testing.assert_close(module(*real), halves(*real))
    assert_meta_is_true(module, *real)


def test_inline_refuses_sizes_that_it_cannot_compute() -> None:
    module = graph_of_sum()
    x = next(iter(placeholders(module.graph).values()))
    with pytest.raises(PassError, match=r"it needs the size .*//2"), at_end(module.graph):
        inline(module.graph, lambda value: value.new_zeros(value.shape[1] // 2), x)


def test_inline_refuses_constants() -> None:
    module = graph_of_sum()
    x = next(iter(placeholders(module.graph).values()))
    weight = torch.randn(3)
    with pytest.raises(PassError, match="it needs the constant"), at_end(module.graph):
        inline(module.graph, lambda value: value * weight, x)
