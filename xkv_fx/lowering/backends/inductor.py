"""Inductor: a graph of static shapes becomes one compiled function. No guards, so nothing can recompile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.errors import BackendError, first_line
from xkv_fx.lowering.cuda_graph import RecordedSteps
from xkv_fx.lowering.kernels.attention import choose_attention
from xkv_fx.lowering.kernels.linear import choose_linear
from xkv_fx.lowering.lift_weights import lift_weights
from xkv_fx.passes.tools.graph import output_node
from xkv_fx.runtime.kernels.functions_cpu import FUNCTIONS

# On CPU, C++ makes the calls of a step: a layer takes some ten short ones, felt with one row if Python makes them. That
# code is built apart from the kernels, since in one file with them it takes several times as long. Sessions check what
# users give; to check the shapes of all weights and caches again takes 0.3 ms a step.
CALLS_FROM_CPP = {
    "cpp_wrapper": True,
    "cpp_wrapper_build_separate": True,
    "size_asserts": False,
    "aot_inductor.custom_ops_to_c_shims": FUNCTIONS,
}


def lower_inductor(module: GraphModule) -> tuple[Callable[..., Tensor], str]:
    """Compile `module` with its weights as inputs; on a GPU its steps are recorded as CUDA graphs besides.

    Returns:
        the compiled function, and what was chosen for its attention and its linear layers.

    Raises:
        BackendError: the compiler is missing or fails, or torch lies in a folder that it cannot be given.
    """
    lifted, weights = lift_weights(module)
    compiled, chosen = compile_lifted(lifted)

    def run(*inputs: Tensor) -> Tensor:
        return compiled(*weights.values(), *inputs)

    if any(weight.device.type == "cuda" for weight in weights.values()):
        return RecordedSteps(run), f"{chosen}; a CUDA graph recorded once a session"
    return run, chosen


def compile_lifted(lifted: GraphModule) -> tuple[Callable[..., Tensor], str]:
    """As `lower_inductor`, for a graph that takes its weights as its first inputs already; the graph is changed."""
    if any(character.isspace() for character in torch.__file__):
        raise BackendError(
            f"Inductor cannot compile with a torch whose path has spaces ({torch.__file__}); install it elsewhere, or "
            "start Python through a link without spaces. backend='eager' runs without"
        )
    chosen = f"{choose_attention(lifted)}; {choose_linear(lifted)}"
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

    return run, chosen
