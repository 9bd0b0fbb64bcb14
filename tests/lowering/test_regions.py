"""A graph that is cut at its layers does what it does at once, and layers that are alike become one region."""

from __future__ import annotations

import pytest
import torch
from ready_models import cache_plan, captured
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from xkv_fx import Budgets, Policy
from xkv_fx.lowering import regions as regions_module
from xkv_fx.lowering.backends import inductor
from xkv_fx.lowering.lift_weights import lift_weights
from xkv_fx.lowering.program import Graphs
from xkv_fx.lowering.regions import Region, Regions, cut_at_layers, whole
from xkv_fx.lowering.run_regions import in_a_row
from xkv_fx.passes.tools.graph import placeholders

PLANS = {
    "ring": Budgets((12, 9, 12, 17, 33, 33)),
    "scored": Budgets((12, 9, 12, 17, 33, 33), Policy(eviction="scored")),
    "fewer bits": Budgets((12, 9, 12, 17, 33, 33), formats=(("int8", "int8"),) * 6),
}


@pytest.fixture(autouse=True)
def regions_take_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that models of few layers are cut."""
    monkeypatch.setattr(regions_module, "OVERHEAD", 10)


def decode_graph(budgets: Budgets, rows: int = 2) -> GraphModule:
    source = captured(layers=len(budgets.capacities), rows=rows)
    plan = cache_plan(source, budgets.capacities, budgets.policy, formats=budgets.formats)
    return Graphs(source, plan, source.scorer_of(budgets.policy)).decode


def decode(budgets: Budgets, rows: int = 2) -> tuple[GraphModule, list[Tensor]]:
    """A decode graph with its weights as inputs, and these."""
    lifted, weights = lift_weights(decode_graph(budgets, rows))
    return lifted, list(weights.values())


def module_of(region: Region) -> GraphModule:
    return region.module


def cut(budgets: Budgets, together: int = 1) -> Regions[GraphModule]:
    return cut_at_layers(decode(budgets)[0], module_of, together=(together,))


@pytest.mark.parametrize(("name", "together"), [("ring", 1), ("ring", 2), ("scored", 1), ("fewer bits", 2)])
def test_logits_and_state_are_the_same_to_the_bit(name: str, together: int) -> None:
    lifted, weights = decode(PLANS[name])
    examples = [node.meta["val"] for node in placeholders(lifted.graph).values()][len(weights) :]
    torch.manual_seed(0)
    state = [torch.randn(each.shape).to(each.dtype) if each.is_floating_point() else zeros(each) for each in examples]
    given, other = ([*weights, *(each.clone() for each in state)] for _ in range(2))
    with torch.no_grad():
        expected = lifted(*given)
    regions = cut(PLANS[name], together)
    assert len(regions.calls) > 2
    assert torch.equal(in_a_row(regions)(*other), expected)
    for one, two in zip(given, other, strict=True):
        assert torch.equal(one, two)


def zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype)


def test_layers_of_all_capacities_are_one_region() -> None:
    regions = cut(PLANS["ring"])
    assert [call.region for call in regions.calls] == [0, 1, 1, 1, 1, 1, 1, 2]
    assert len(regions.made) == 3


def test_the_number_of_layers_together_leaves_least_to_compile() -> None:
    regions = cut_at_layers(decode(PLANS["ring"])[0], module_of, together=(4, 3))
    assert [call.region for call in regions.calls] == [0, 1, 1, 2]


def test_layers_of_which_something_else_is_true_are_another_region() -> None:
    """What is made of a region branches on the sizes of one call."""

    def branching(region: Region) -> bool:
        sizes = [size for node in placeholders(region.module.graph).values() for size in node.meta["val"].shape]
        return any(isinstance(size, torch.SymInt) and size > 20 for size in sizes)

    regions = cut_at_layers(decode(PLANS["ring"])[0], branching, together=(1,))
    assert [call.region for call in regions.calls] == [0, 1, 1, 1, 1, 2, 2, 3]


def test_few_layers_are_not_cut() -> None:
    assert len(cut_at_layers(decode(Budgets((12, 9)))[0], module_of).calls) == 1


def test_one_region_returns_what_the_graph_does() -> None:
    graph = Graph()
    graph.output(graph.call_function(torch.neg, (graph.placeholder("x"),)))
    regions = whole(GraphModule(nn.Module(), graph), module_of)
    assert torch.equal(in_a_row(regions)(torch.ones(3)), -torch.ones(3))


def test_inductor_compiles_regions_of_open_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "cut_at_layers", lambda *given: cut_at_layers(*given, together=(1,)))
    plan = Budgets((48, 64, 32))
    lowered = inductor.BACKEND.lower(decode_graph(plan, 1))
    assert inductor.BACKEND.describe(lowered).startswith("5 parts in a row, 3 of them different, compiled by Inductor")
    lifted, weights = decode(plan, 1)
    state = [zeros(node.meta["val"]) for node in placeholders(lifted.graph).values()][len(weights) :]
    for _ in range(2):
        given, other = ([each.clone() for each in state] for _ in range(2))
        with torch.no_grad():
            expected = lifted(*weights, *given)
        torch.testing.assert_close(lowered.run(*other), expected)
        for one, two in zip(given, other, strict=True):
            torch.testing.assert_close(one, two)
        state = given
