"""Running captured graphs node by node: what each node computes, and whether the graph tells the truth about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.graph import CodeGen

from xkv_fx.passes.tools.graph import calls, output_node


def export(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """The graph of a function of tensors or a module, as capture leaves it; their dimension 1 is one dynamic size."""
    length = {1: torch.export.Dim("length", min=2, max=4096)}
    program = torch.export.export(_Function(function), inputs, dynamic_shapes={"inputs": (length,) * len(inputs)})
    exported = program.module(check_guards=False)
    graph = exported.graph
    assert isinstance(graph, Graph)
    graph.set_codegen(CodeGen())
    output = output_node(graph)
    results = cast("tuple[tuple[Node, ...]]", output.args)[0]
    output.args = (results[0] if len(results) == 1 else results,)
    return GraphModule(exported, graph)


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


class Recorder(Interpreter):
    """Runs a graph and keeps what every node computed."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}
        self.inputs: dict[Node, tuple[Any, ...]] = {}

    def run_node(self, n: Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        self.inputs[n] = tuple(args)
        self.values[n] = super().run_node(n)
        return self.values[n]


def record(module: GraphModule, *inputs: Tensor) -> Recorder:
    """Run a graph on real tensors."""
    recorder = Recorder(module)
    with torch.no_grad():
        recorder.run(*inputs)
    return recorder


def attention_inputs(module: GraphModule, *inputs: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The queries, keys and values that reach each attention of a captured graph."""
    recorder = record(module, *inputs)
    return [recorder.inputs[node][:3] for node in calls(module, torch.ops.xkv.attention.default)]


def assert_meta_is_true(module: GraphModule, *inputs: Tensor) -> None:
    """Run a graph and check the shape and dtype that each node's fake value promises, for these input sizes."""
    recorder = record(module, *inputs)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    sizes: dict[Any, int] = {}
    for node, real in zip(placeholders, inputs, strict=True):
        for promised, size in zip(node.meta["val"].shape, real.shape, strict=True):
            if isinstance(promised, torch.SymInt):
                assert sizes.setdefault(promised.node.expr, size) == size
    for node, real in recorder.values.items():
        if node.op in ("call_function", "placeholder"):
            _assert_promise(node, node.meta["val"], real, sizes)


def _assert_promise(node: Node, promised: Any, real: Any, sizes: dict[Any, int]) -> None:
    if isinstance(real, tuple | list):
        for part, value in zip(promised, real, strict=True):
            _assert_promise(node, part, value, sizes)
    elif isinstance(real, Tensor):
        assert real.dtype == promised.dtype, node.format_node()
        assert list(real.shape) == [_size(dim, sizes) for dim in promised.shape], node.format_node()
    elif isinstance(real, int) and not isinstance(real, bool):
        assert real == _size(promised, sizes), node.format_node()


def _size(promised: Any, sizes: dict[Any, int]) -> int:
    return int(promised.node.expr.subs(sizes)) if isinstance(promised, torch.SymInt) else promised


def doubled_plus(x: Tensor, y: Tensor) -> Tensor:
    return x * 2 + y


def graph_of_sum() -> GraphModule:
    return export(doubled_plus, torch.randn(2, 7, 3), torch.randn(2, 7, 3))
