"""Pipelines are data, their graphs can be read, and what was captured is never touched."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from ready_models import cache_plan, captured, model, transformed
from tiny_models import llama
from torch import Tensor
from torch.fx import GraphModule, Node

from xkv_fx import Budgets
from xkv_fx.errors import BackendError, PassError
from xkv_fx.hf.capture import capture
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.cache.check_cache import CheckCache
from xkv_fx.passes.pipeline import (
    TransformedGraph,
    decode_pipeline,
    extend_pipeline,
    prefill_pipeline,
    profile_pipeline,
    run_pipeline,
)
from xkv_fx.passes.tools.graph import calls, output_node, placeholders
from xkv_fx.runtime.scorers import SnapKV

NAMES = ("prefill", "prefill of all logits", "extend", "extend of all logits", "decode", "profile")
CAPACITIES = (12, 21, 17)
xkv = torch.ops.xkv


@functools.cache
def pipelines() -> dict[str, tuple[GraphPass, ...]]:
    plan = cache_plan(captured(), CAPACITIES)
    return {
        "prefill": prefill_pipeline(plan, SnapKV()),
        "prefill of all logits": prefill_pipeline(plan, SnapKV(), all_logits=True),
        "extend": extend_pipeline(plan, SnapKV()),
        "extend of all logits": extend_pipeline(plan, SnapKV(), all_logits=True),
        "decode": decode_pipeline(plan),
        "profile": profile_pipeline(SnapKV()),
    }


def run(name: str) -> TransformedGraph:
    return run_and_compare(name)[0]


@functools.cache
def run_and_compare(name: str) -> tuple[TransformedGraph, bool]:
    """What a pipeline makes of a captured graph, and whether that graph is still what it was."""
    source = captured().token if name == "decode" else captured().prompt
    assert source is not None
    before = contents(source)
    result = run_pipeline(captured().graph("token" if name == "decode" else "prompt"), pipelines()[name])
    return result, contents(source) == before


def contents(module: GraphModule) -> tuple[str, list[int]]:
    """The code of a graph, and which fake value each node carries."""
    return readable(module), [id(node.meta.get("val")) for node in module.graph.nodes]


def readable(module: GraphModule) -> str:
    return module.print_readable(print_output=False)


@pytest.mark.parametrize("name", ["prefill", "extend"])
def test_capacities_are_literals_of_the_prompt_graphs(name: str) -> None:
    text = readable(run(name).module)
    chosen = re.findall(r"choose_survivors_(\d+)_recent_(\d+)\(", text)
    assert chosen == [(str(capacity), str(capacity // 4)) for capacity in CAPACITIES]
    kept = re.findall(r"keep\.default\(.*?capacity = (\d+)", text)
    assert kept == [str(capacity) for capacity in CAPACITIES]


def test_capacities_are_literals_of_the_decode_graph() -> None:
    text = readable(run("decode").module)
    for layer, capacity in enumerate(CAPACITIES):
        assert f'k_{layer}: "f32[2, 2, {capacity}, 8]"' in text
        assert f'slot_of_{capacity}: "i64[2]"' in text
        assert re.search(rf"add\.Tensor\(\w+, {capacity - capacity // 4}\)", text), "the start of the ring"


@pytest.mark.parametrize("name", ["prefill", "extend", "decode"])
def test_each_layer_has_one_attention(name: str) -> None:
    module = run(name).module
    kinds = {
        "prefill": xkv.attention.default,
        "extend": xkv.extend_attention.default,
        "decode": xkv.decode_attention.default,
    }
    counts = {kind: len(calls(module, target)) for kind, target in kinds.items()}
    assert counts == {kind: 3 if kind == name else 0 for kind in kinds}
    assert len(calls(module, xkv.keep.default)) == (0 if name == "decode" else 3)


@pytest.mark.parametrize("kind", ["prompt", "token"])
def test_each_captured_layer_has_one_attention(kind: Any) -> None:
    nodes = calls(captured().graph(kind), xkv.attention.default)
    assert [node.args[3] for node in nodes] == [0, 1, 2]


def test_decode_has_static_shapes_only() -> None:
    for node in run("decode").module.graph.nodes:
        value = node.meta.get("val")
        assert not isinstance(value, torch.SymInt)
        if isinstance(value, Tensor):
            assert all(type(size) is int for size in value.shape)


@pytest.mark.parametrize("name", NAMES)
def test_records_come_one_a_pass_in_order(name: str) -> None:
    result = run(name)
    assert [record.name for record in result.records] == [graph_pass.name for graph_pass in pipelines()[name]]
    assert all(record.matched > 0 and record.changed >= 0 for record in result.records)
    result.module.graph.lint()


def test_the_order_of_each_pipeline() -> None:
    names = {name: [graph_pass.name for graph_pass in passes] for name, passes in pipelines().items()}
    start = ["clean_graph", "compact_padding"]
    assert names == {
        "prefill": [*start, "select_last_logits", "insert_prefill_cache", "check_cache"],
        "prefill of all logits": [*start, "insert_prefill_cache", "check_cache"],
        "extend": [*start, "select_last_logits", "insert_extend_cache", "check_cache"],
        "extend of all logits": [*start, "insert_extend_cache", "check_cache"],
        "decode": ["clean_graph", "insert_decode_cache", "check_cache"],
        "profile": [*start, "score_outputs"],
    }
    for name, passes in pipelines().items():
        checks = [graph_pass for graph_pass in passes if isinstance(graph_pass, CheckCache)]
        assert [check.kind for check in checks] == ([] if name == "profile" else [name.split()[0]])


@pytest.mark.parametrize("name", NAMES)
def test_the_captured_graph_is_not_touched(name: str) -> None:
    assert run_and_compare(name)[1]


def test_weights_are_the_models_own() -> None:
    own = {id(tensor) for tensor in (*model("llama", 3).parameters(), *model("llama", 3).buffers())}
    for name in NAMES:
        module = run(name).module
        weights = [node for node in module.graph.nodes if node.op == "get_attr"]
        for node in weights:
            owner, _, attribute = str(node.target).rpartition(".")
            assert id(getattr(module.get_submodule(owner), attribute)) in own, node.target


def test_a_copy_without_a_token_graph_says_so() -> None:
    without = dataclasses.replace(captured(), token=None)
    with pytest.raises(PassError, match="captured without the graph of one token"):
        without.graph("token")


@dataclasses.dataclass(frozen=True)
class Scale(GraphPass):
    """A pass as a user would write it: multiplies the logits."""

    factor: float
    name: ClassVar[str] = "scale"

    def run(self, module: GraphModule) -> PassRecord:
        output = output_node(module.graph)
        logits = output.args[0]
        assert isinstance(logits, Node)
        with module.graph.inserting_before(output):
            scaled = module.graph.call_function(torch.ops.aten.mul.Tensor, (logits, self.factor))
            module.graph.call_function(torch.ops.aten.neg.default, (logits,))  # dead: the base class removes it
        output.args = (scaled,)
        return PassRecord(self.name, 1, 1, "by a user")


def test_a_pipeline_can_be_extended() -> None:
    plain, scaled = (captured().graph("prompt") for _ in range(2))
    ids, positions = torch.arange(3, 9).expand(2, -1), torch.arange(6).expand(2, -1)
    result = run_pipeline(scaled, (pipelines()["prefill"][0], Scale(2.0)))
    assert result.records[-1] == PassRecord("scale", 1, 1, "by a user")
    assert not calls(result.module, torch.ops.aten.neg.default)[6:], "two of each layer's rotations are the model's"
    with torch.no_grad():
        torch.testing.assert_close(result.module(ids, positions), 2 * plain(ids, positions))


def test_a_pass_without_run_is_an_error() -> None:
    class Idle(GraphPass):
        pass

    with pytest.raises(PassError, match=r"the pass Idle does not implement run\(\)"):
        run_pipeline(captured().graph("prompt"), (Idle(),))


def test_a_pass_that_fixes_the_length_is_an_error() -> None:
    class Fix(GraphPass):
        name = "fix"

        def run(self, module: GraphModule) -> PassRecord:
            int(next(iter(module.graph.nodes)).meta["val"].shape[1])
            return PassRecord(self.name, 0, 0)

    graph = capture(llama(1)).graph("prompt")  # of its own, which this spoils
    with pytest.raises(PassError, match="the pass 'fix' fixed dimension 1 of the input 'input_ids'"):
        run_pipeline(graph, (Fix(),))


@pytest.mark.parametrize("show", [repr, str], ids=["repr", "str"])
def test_a_pipeline_can_be_printed(show: Callable[[object], str]) -> None:
    text = show(pipelines()["prefill"])
    for word in ("CleanGraph", "CompactPadding", "InsertPrefillCache", "capacity=21", "SnapKV"):
        assert word in text


@pytest.mark.parametrize("kind", ["prefill", "extend", "decode"])
def test_the_graph_can_be_looked_at_after_every_pass(kind: Any) -> None:
    llm = transformed(Budgets((12, 16)))
    steps = llm.passes(kind)
    made = llm.program.graphs.get(kind)
    assert [step.record for step in steps] == list(made.records)
    assert all(step.record.seconds > 0 for step in steps)
    assert readable(steps[-1].module) == readable(made.module)
    assert len({readable(step.module) for step in steps}) > 1
    assert str(steps[0]).startswith("clean_graph: matched ")
    inputs = [len(placeholders(step.module.graph)) for step in steps]
    assert (inputs[0], inputs[-1]) == (2, len(placeholders(made.module.graph)))


def test_another_kind_of_graph_is_refused() -> None:
    kind: Any = "decoding"
    with pytest.raises(BackendError, match="no 'decoding' graph; choose one of prefill, extend, decode"):
        transformed(Budgets((12, 16))).passes(kind)
