"""Inductor: a graph of static shapes becomes one compiled function. No guards, so nothing can recompile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.errors import BackendError
from xkv_fx.lowering.lift_weights import lift_weights
from xkv_fx.runtime.ops import DECOMPOSITIONS


def lower_inductor(module: GraphModule) -> Callable[..., Tensor]:
    """Compile `module` with its weights as inputs; the budgeted ops are opened so that Inductor sees into them.

    Raises:
        BackendError: the compiler is missing or fails.
    """
    lifted, weights = lift_weights(module)
    for node in lifted.graph.nodes:
        if node.target in DECOMPOSITIONS:
            node.target = DECOMPOSITIONS[node.target]
    output = next(iter(reversed(lifted.graph.nodes)))
    output.args = ((output.args[0],),)
    lifted.recompile()
    examples = [node.meta["val"] for node in lifted.graph.nodes if node.op == "placeholder"]
    try:
        with torch.no_grad():
            compiled = torch._inductor.standalone_compile(lifted, examples, dynamic_shapes="from_graph")
    except Exception as error:
        raise BackendError(
            f"Inductor could not compile the decode graph ({_first_line(error)}); it needs a C++ compiler on CPU and "
            "Triton on CUDA. backend='eager' runs without"
        ) from error

    def run(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = compiled(*weights, *inputs)[0]
        return logits

    return run


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
