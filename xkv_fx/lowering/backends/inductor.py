"""Inductor: a graph of static shapes becomes compiled functions. No guards, so nothing can recompile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.errors import BackendError, first_line
from xkv_fx.lowering.backends.backend import Backend, Lowered
from xkv_fx.lowering.cuda_graph import RecordedSteps
from xkv_fx.lowering.kernels.table import choose_kernels, describe_choices
from xkv_fx.lowering.lift_weights import lift_weights
from xkv_fx.lowering.regions import Region, cut_at_layers, whole
from xkv_fx.lowering.run_regions import Compiled, in_a_row
from xkv_fx.passes.tools.graph import output_node, placeholders
from xkv_fx.runtime.kernels.build_cpu import VECTORS_AS_TORCH
from xkv_fx.runtime.kernels.functions_cpu import FUNCTIONS

# On CPU, C++ makes the calls of a step: a layer has about ten short ones, too slow for one row from Python. That
# code is built apart from the kernels, since in one file with them it takes several times as long. Sessions check what
# users give; to check the shapes of all weights and caches again takes 0.3 ms a step.
CALLS_FROM_CPP = {
    "cpp_wrapper": True,
    "cpp_wrapper_build_separate": True,
    "size_asserts": False,
    "aot_inductor.custom_ops_to_c_shims": FUNCTIONS,
    **VECTORS_AS_TORCH,
}


def _lower(module: GraphModule) -> Lowered:
    """Compile `module` with its weights as inputs, on CPU each kind of layer once. On a GPU its steps are recorded as
    CUDA graphs too, if it holds its weights: weights passed in with a call may have moved by the next one.

    Raises:
        BackendError: the compiler is missing or fails, or torch lies in a folder that it cannot be given.
    """
    if any(character.isspace() for character in torch.__file__):
        raise BackendError(
            f"Inductor cannot compile with a torch whose path has spaces ({torch.__file__}); install it elsewhere, or "
            "start Python through a link without spaces. backend='eager' runs without"
        )
    lifted, weights = lift_weights(module)
    choices = choose_kernels(lifted)
    regions = (cut_at_layers if _on_cpu(lifted) else whole)(lifted, _compile)
    compiled = in_a_row(regions)

    def run(*inputs: Tensor) -> Tensor:
        return compiled(*weights.values(), *inputs)

    on_gpu = any(weight.device.type == "cuda" for weight in weights.values())
    return Lowered(RecordedSteps(run) if on_gpu else run, choices, len(regions.calls), len(regions.made))


def _on_cpu(module: GraphModule) -> bool:
    return all(node.meta["val"].device.type == "cpu" for node in placeholders(module.graph).values())


def _compile(region: Region) -> Compiled:
    module = region.module
    examples = [node.meta["val"] for node in placeholders(module.graph).values()]
    if region.sizes is not None:
        results: Any = output_node(module.graph).args[0]
        for result in results:
            result.meta["example_value"] = examples[0]  # where Inductor looks for the mode that has the open sizes
    options = {"config_patches": CALLS_FROM_CPP} if _on_cpu(module) else {}
    try:
        with torch.no_grad():
            compiled: Compiled = torch._inductor.standalone_compile(
                module, examples, dynamic_shapes="from_graph", options=options
            )
    except Exception as error:
        raise BackendError(
            f"Inductor could not compile the decode graph ({first_line(error)}); it needs a C++ compiler on CPU and "
            "Triton on CUDA. backend='eager' runs without"
        ) from error
    return compiled


def _describe(lowered: Lowered) -> str:
    recorded = "; a CUDA graph recorded once a session" if isinstance(lowered.run, RecordedSteps) else ""
    made = "one graph" if lowered.parts == 1 else f"{lowered.parts} parts in a row, {lowered.made} of them different"
    return f"{made}, compiled by Inductor, static shapes; attention: {describe_choices(lowered.choices)}{recorded}"


BACKEND = Backend(_lower, _describe)
