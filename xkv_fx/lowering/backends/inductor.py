"""Inductor: a graph of static shapes becomes one compiled function. No guards, so nothing can recompile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.errors import BackendError, first_line
from xkv_fx.lowering.backends.backend import Backend, Lowered
from xkv_fx.lowering.cuda_graph import RecordedSteps
from xkv_fx.lowering.kernels.kernel import Choice
from xkv_fx.lowering.kernels.table import choose_kernels, describe_choices
from xkv_fx.lowering.lift_weights import lift_weights
from xkv_fx.passes.tools.graph import output_node
from xkv_fx.runtime.kernels.functions_cpu import FUNCTIONS

# On CPU, C++ makes the calls of a step: a layer has about ten short ones, too slow for one row from Python. That
# code is built apart from the kernels, since in one file with them it takes several times as long. Sessions check what
# users give; to check the shapes of all weights and caches again takes 0.3 ms a step.
CALLS_FROM_CPP = {
    "cpp_wrapper": True,
    "cpp_wrapper_build_separate": True,
    "size_asserts": False,
    "aot_inductor.custom_ops_to_c_shims": FUNCTIONS,
}


def _lower(module: GraphModule) -> Lowered:
    """Compile `module` with its weights as inputs. On a GPU its steps are recorded as CUDA graphs too, if it holds its
    weights: weights passed in with a call may have moved by the next one.

    Raises:
        BackendError: the compiler is missing or fails, or torch lies in a folder that it cannot be given.
    """
    lifted, weights = lift_weights(module)
    choices, compiled = _compile(lifted)

    def run(*inputs: Tensor) -> Tensor:
        return compiled(*weights.values(), *inputs)

    on_gpu = any(weight.device.type == "cuda" for weight in weights.values())
    return Lowered(RecordedSteps(run) if on_gpu else run, choices)


def _compile(lifted: GraphModule) -> tuple[tuple[Choice, ...], Callable[..., Tensor]]:
    """Choose kernels for a graph that takes its weights as inputs, which is changed, and compile it."""
    if any(character.isspace() for character in torch.__file__):
        raise BackendError(
            f"Inductor cannot compile with a torch whose path has spaces ({torch.__file__}); install it elsewhere, or "
            "start Python through a link without spaces. backend='eager' runs without"
        )
    choices = choose_kernels(lifted)
    output = output_node(lifted.graph)
    output.args = ((output.args[0],),)
    lifted.recompile()
    examples = [node.meta["val"] for node in lifted.graph.nodes if node.op == "placeholder"]
    on_cpu = all(example.device.type == "cpu" for example in examples)
    options = {"config_patches": CALLS_FROM_CPP} if on_cpu else {}
    try:
        with torch.no_grad():
            compiled = torch._inductor.standalone_compile(
                lifted, examples, dynamic_shapes="from_graph", options=options
            )
    except Exception as error:
        raise BackendError(
            f"Inductor could not compile the decode graph ({first_line(error)}); it needs a C++ compiler on CPU and "
            "Triton on CUDA. backend='eager' runs without"
        ) from error

    def run(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = compiled(*inputs)[0]
        return logits

    return choices, run


def _describe(lowered: Lowered) -> str:
    recorded = "; a CUDA graph recorded once a session" if isinstance(lowered.run, RecordedSteps) else ""
    return f"one graph, compiled by Inductor, static shapes; attention: {describe_choices(lowered.choices)}{recorded}"


BACKEND = Backend(_lower, _describe)
