"""Decode graphs of a GPU that need not be there: fake tensors on it, and a driver that says it is a Hopper."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
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


class Hopper:
    """All that torch asks Triton's driver when it reads off a kernel which of its arguments it changes."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver  # of a GPU that is not there

    monkeypatch.setattr(driver, "_active", Hopper())
