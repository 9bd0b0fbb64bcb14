"""No compiler: the graph module runs node by node."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule


def lower_eager(module: GraphModule) -> Callable[..., Tensor]:
    """Run `module` as it is, without recording gradients."""

    def run(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = module(*inputs)
        return logits

    return run
