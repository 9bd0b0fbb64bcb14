"""Decode graphs of a GPU that need not be there: fake tensors on it, and a driver that says it is a Hopper."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from xkv_fx.lowering.kernels.table import choose_kernels, describe_choices

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def mode() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as fake:
        yield fake


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def graph(attend: Callable[..., Any], *values: torch.Tensor) -> GraphModule:
    module = make_fx(attend)(*values)
    for node, value in zip(module.graph.nodes, values, strict=False):
        node.meta["val"] = value
    return module


def masked(slots: int = 1000, heads: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [on_gpu(2, dtype=torch.int64), on_gpu(2, heads, 1, slots, dtype=dtype)]


def choose(module: GraphModule) -> str:
    return describe_choices(choose_kernels(module))


def targets(module: GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def triton_nodes(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if "triton" in str(node.target)]


@dataclasses.dataclass(frozen=True)
class Traced:
    """What Inductor and AOTInductor see of an op.

    Attributes:
        targets: of all calls.
        launches: how many of Triton kernels there are among them.
        changed: numbers of the inputs that are changed in place.
        written: names of the kernels' arguments that are written to, besides outputs and their parts.
    """

    targets: list[Any]
    launches: int
    changed: set[int]
    written: set[str]


def traced(attend: Callable[..., Any], given: Sequence[torch.Tensor]) -> Traced:
    """An op as Inductor and AOTInductor trace it, on fake tensors on CPU: this torch may know of no GPU at all."""
    values = [torch.empty_like(value, device="cpu") for value in given]
    module, signature = aot_export_module(graph(attend, *values), values, trace_joint=False)
    nodes = [node for node in module.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    changed = {int(name.split("_")[0].removeprefix("arg")) for name in signature.user_inputs_to_mutate.values()}
    written = {name for node in nodes for name in node.kwargs["tensors_to_clone"]}
    return Traced(targets(module), len(nodes), changed, written - {"out", "parts", "lse", "logits", "whole_lse"})


class Hopper:
    """All that torch asks Triton's driver when it reads off a kernel which of its arguments it changes."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver  # of a GPU that is not there

    monkeypatch.setattr(driver, "_active", Hopper())
