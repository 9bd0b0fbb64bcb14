"""The last pass refuses every graph that is not what the plan says, and names the nodes that are wrong."""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from ready_models import cache_plan, captured
from torch.fx import GraphModule, Node

from xkv_fx.errors import PassError
from xkv_fx.passes.cache.check_cache import CheckCache
from xkv_fx.passes.pipeline import decode_pipeline, extend_pipeline, prefill_pipeline, run_pipeline
from xkv_fx.passes.tools.graph import at_end, calls, emit, output_node, placeholders
from xkv_fx.runtime.scorers import SnapKV
from xkv_fx.runtime.state import CachePlan

Kind = Literal["prefill", "extend", "decode"]
KINDS: tuple[Kind, ...] = ("prefill", "extend", "decode")
WITH_LENGTH: tuple[Kind, ...] = ("prefill", "extend")
aten, xkv = torch.ops.aten, torch.ops.xkv


@dataclasses.dataclass(frozen=True)
class Graph:
    """A graph as its pipeline leaves it, before the check."""

    kind: Kind
    plan: CachePlan
    module: GraphModule

    @property
    def writes(self) -> list[Node]:
        writer = xkv.decode_attention.default if self.kind == "decode" else xkv.keep.default
        return calls(self.module, writer)

    def input(self, name: str) -> Node:
        return placeholders(self.module.graph)[name]

    def set(self, node: Node, name: str, value: Any) -> None:
        """Replace an argument of a call by name."""
        schema = node.target._schema  # type: ignore[union-attr]
        index = [argument.name for argument in schema.arguments].index(name)
        if index < len(node.args):
            node.args = (*node.args[:index], value, *node.args[index + 1 :])
        else:
            node.kwargs = {**node.kwargs, name: value}

    def emit(self, target: Any, *args: Any) -> Node:
        with at_end(self.module.graph):
            return emit(self.module.graph, target, *args)

    def also_return(self, node: Node) -> Node:
        """Keep a node that nothing else uses."""
        output = output_node(self.module.graph)
        output.args = ((output.args[0], node),)
        return node

    def refused(self, match: str, plan: CachePlan | None = None) -> None:
        with pytest.raises(PassError, match=rf"the {self.kind} graph is not as planned: expected {match}$"):
            CheckCache(plan or self.plan, self.kind)(self.module)


def build(kind: Kind) -> Graph:
    """A copy to tamper with."""
    plan, module = planned(kind)
    return Graph(kind, plan, GraphModule(module, copy.deepcopy(module.graph)))


@functools.cache
def planned(kind: Kind) -> tuple[CachePlan, GraphModule]:
    plan = cache_plan(captured(), (12, 16, 12))
    if kind == "decode":
        source, pipeline = captured().graph("token"), decode_pipeline(plan)
    else:
        make = prefill_pipeline if kind == "prefill" else extend_pipeline
        source, pipeline = captured().graph("prompt"), make(plan, SnapKV())
    assert isinstance(pipeline[-1], CheckCache), "the pipeline ends with the check"
    return plan, run_pipeline(source, pipeline[:-1]).module


@pytest.fixture(params=KINDS)
def graph(request: pytest.FixtureRequest) -> Graph:
    return build(request.param)


def names(nodes: list[Node]) -> str:
    return ", ".join(node.name for node in nodes)


def test_a_planned_graph_passes_and_stays_as_it_is(graph: Graph) -> None:
    code = graph.module.code
    record = CheckCache(graph.plan, graph.kind)(graph.module)
    assert (record.name, record.matched, record.changed) == ("check_cache", 3, 0)
    assert graph.module.code == code


def test_a_layer_that_writes_no_cache(graph: Graph) -> None:
    first, second, third = graph.writes
    second.replace_all_uses_with(second.args[0])  # type: ignore[arg-type]
    graph.module.graph.erase_node(second)
    graph.refused(f"3 writes of a cache, found {names([first, third])}")


def test_no_layer_writes_a_cache(graph: Graph) -> None:
    for node in graph.writes:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.module.graph.erase_node(node)
    graph.refused("3 writes of a cache, found none")


def test_a_cache_that_is_written_twice(graph: Graph) -> None:
    last = graph.writes[-1]
    with graph.module.graph.inserting_after(last):
        again = graph.module.graph.node_copy(last)
    graph.refused(f"3 writes of a cache, found {names([*graph.writes[:3], again])}")


@pytest.mark.parametrize("kind", ["extend", "decode"])
def test_an_attention_that_was_left_as_captured(kind: Kind) -> None:
    graph = build(kind)
    cached = xkv.decode_attention.default if kind == "decode" else xkv.extend_attention.default
    plain = graph.also_return(graph.emit(xkv.attention.default, *calls(graph.module, cached)[0].args[:3], 0, 0.5))
    graph.refused(f"0 attentions without a cache, found {plain.name}")


def test_prefill_must_attend_in_every_layer() -> None:
    graph = build("prefill")
    plain = calls(graph.module, xkv.attention.default)
    plain[1].replace_all_uses_with(plain[1].args[0])  # type: ignore[arg-type]
    graph.module.graph.erase_node(plain[1])
    graph.refused(f"3 attentions without a cache, found {names([plain[0], plain[2]])}")


@pytest.mark.parametrize("cache", ["k", "v"])
def test_a_layer_that_writes_another_layers_buffers(graph: Graph, cache: str) -> None:
    wrong = graph.writes[2]
    graph.set(wrong, f"{cache}_cache", graph.input(f"{cache}_0"))
    graph.refused(f"layer 2 to write its own buffers, found {wrong.name}")


def test_two_layers_that_swapped_their_buffers(graph: Graph) -> None:
    first, _, third = graph.writes
    graph.set(first, "k_cache", graph.input("k_2"))
    graph.set(third, "k_cache", graph.input("k_0"))
    graph.refused(f"layer 0 to write its own buffers, found {first.name}")


@pytest.mark.parametrize("kind", WITH_LENGTH)
def test_a_layer_that_writes_another_layers_positions(kind: Kind) -> None:
    graph = build(kind)
    wrong = graph.writes[2]
    graph.set(wrong, "positions", graph.input("positions_0"))
    graph.refused(f"layer 2 to write its own buffers, found {wrong.name}")


def test_buffers_of_another_size_than_planned(graph: Graph) -> None:
    plan = cache_plan(captured(), (12, 17, 12))
    graph.refused("17 slots in layer 1, found k_1", plan)


@pytest.mark.parametrize("kind", WITH_LENGTH)
def test_a_capacity_that_is_not_the_planned_literal(kind: Kind) -> None:
    graph = build(kind)
    wrong = graph.writes[1]
    graph.set(wrong, "capacity", 15)
    graph.refused(f"capacity 16 in layer 1, found {wrong.name}")


@pytest.mark.parametrize("copy_by", [aten.clone.default, aten.contiguous.default, aten._to_copy.default], ids=str)
@pytest.mark.parametrize("cache", ["k_1", "v_1"])
def test_a_copy_of_a_cache(graph: Graph, copy_by: Any, cache: str) -> None:
    copied = graph.also_return(graph.emit(copy_by, graph.input(cache)))
    graph.refused(f"no copy of the cache of layer 1, found {copied.name}")


def clone_of_view(graph: Graph, cache: Node) -> Node:
    return graph.emit(aten.clone.default, graph.emit(aten.slice.Tensor, cache, 2, 0, 16))


def out_of_place_write(graph: Graph, cache: Node) -> Node:
    first = graph.emit(aten.zeros_like.default, graph.input("seen"))
    return graph.emit(aten.index_put.default, cache, [first], graph.emit(aten.neg.default, cache))


def concatenation(graph: Graph, cache: Node) -> Node:
    return graph.emit(aten.cat.default, [cache, cache], 2)


@pytest.mark.parametrize("copy_by", [clone_of_view, out_of_place_write, concatenation])
def test_a_copy_of_a_cache_by_other_ops(graph: Graph, copy_by: Callable[[Graph, Node], Node]) -> None:
    graph.also_return(copy_by(graph, graph.input("k_1")))
    graph.refused("no copy of the cache of layer 1, found .*")


@pytest.mark.parametrize("kind", WITH_LENGTH)
def test_a_mask_over_all_pairs_of_tokens(kind: Kind) -> None:
    graph = build(kind)
    length = graph.emit(aten.sym_size.int, graph.input("input_ids"), 1)
    ones = graph.emit(aten.ones.default, [length, length])
    mask = graph.also_return(graph.emit(aten.tril.default, ones))
    graph.refused(f"no mask over all pairs of tokens, found {names([ones, mask])}")


def test_a_mask_over_slots_and_tokens() -> None:
    graph = build("extend")
    length = graph.emit(aten.sym_size.int, graph.input("input_ids"), 1)
    mask = graph.also_return(graph.emit(aten.ones.default, [length, graph.emit(operator.add, length, 12)]))
    graph.refused(f"no mask over all pairs of tokens, found {mask.name}")
