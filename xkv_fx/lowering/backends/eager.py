"""No compiler: the graph module runs node by node."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.lowering.backends.backend import Backend, Lowered


def run_eager(module: GraphModule) -> Callable[..., Tensor]:
    """Run `module` as it is, without recording gradients."""

    def run(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = module(*inputs)
        return logits

    return run


def _lower(module: GraphModule) -> Lowered:
    return Lowered(run_eager(module))


def _describe(lowered: Lowered) -> str:
    return "graph of torch kernels; attention: torch ops"


BACKEND = Backend(_lower, _describe)
