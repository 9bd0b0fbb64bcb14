"""From a transformed graph to a `torch.export.ExportedProgram` of plain aten ops, right for every length of prompt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from xkv_fx.engines.token_loops import with_token_loops
from xkv_fx.errors import BackendError, UnsupportedModelError, XkvError, first_line
from xkv_fx.lowering.lift_weights import lift_weights
from xkv_fx.passes.tools.graph import placeholders
from xkv_fx.runtime.any_length import ANY_LENGTH
from xkv_fx.runtime.plain_forms import PLAIN_FORMS
from xkv_fx.runtime.scorers import Scorer

SHORTEST = 2
"""Fewest columns that a graph of prompts takes, padding among them: torch.export makes a size of 1 a constant."""

_EXAMPLE = 5
_OURS = {**PLAIN_FORMS, **ANY_LENGTH}
_PLAIN = {"aten", "prims", "higher_order"}


def trace_program(
    module: GraphModule, scorer: Scorer, longest: int, forms: Mapping[Any, Callable[..., Tensor]] = MappingProxyType({})
) -> tuple[ExportedProgram, dict[str, Tensor]]:
    """Trace a graph with its weights as inputs, before all others.

    Args:
        module: of a pipeline; each of our ops in it is traced through.
        scorer: the scorer in the module, for messages.
        longest: most columns of a prompt.
        forms: functions to trace through instead of further ops, by op.

    Returns:
        the program, and the weights by their names in `module`, in the program's order: contiguous, otherwise shared.

    Raises:
        UnsupportedModelError: a weight that is not a plain tensor.
        BackendError: what the graph does cannot be traced for every length, or only with an op that is not aten's.
    """
    lifted, weights = lift_weights(with_token_loops(module))
    weights = {name: _plain_tensor(name, weight) for name, weight in weights.items()}
    instead = {**_OURS, **forms}
    for node in lifted.graph.nodes:
        if node.op == "call_function":
            node.target = instead.get(node.target, node.target)
    lifted.recompile()
    others = list(placeholders(lifted.graph).values())[len(weights) :]
    sizes = [node.meta["val"] for node in others]
    examples = [
        torch.zeros([_EXAMPLE if isinstance(n, torch.SymInt) else n for n in value.shape], dtype=value.dtype).to(
            value.device
        )
        for value in sizes
    ]
    dynamic = [_dynamic(value, longest) for value in sizes]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
            warnings.filterwarnings("ignore", category=FutureWarning)
            program = torch.export.export(
                lifted, (*weights.values(), *examples), dynamic_shapes=(*[None] * len(weights), *dynamic), strict=False
            )
            if any(target in ANY_LENGTH for target in _targets(program)):  # inside what a scorer does
                program = program.run_decompositions(ANY_LENGTH)
    except XkvError:
        raise
    except Exception as error:  # a user's scorer may raise anything while it is traced
        raise BackendError(
            f"the graph cannot be traced for every length of prompt ({first_line(error)}); where the scorer "
            f"{type(scorer).__name__} is the reason, it may use tensor ops only and not branch or loop on sizes"
        ) from error
    check_plain(program, f"the model or the scorer {type(scorer).__name__}")
    return program, weights


def check_plain(program: ExportedProgram, caller: str) -> None:
    """Raise BackendError, naming the `caller`, where a program calls an op that is not torch's own."""
    foreign = sorted({str(target) for target in _targets(program) if target.namespace not in _PLAIN})
    if foreign:
        raise BackendError(
            f"an engine runs without the code that defines {', '.join(foreign)}, which {caller} calls; express it in "
            "torch's own ops"
        )


def _plain_tensor(name: str, weight: Tensor) -> Tensor:
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.layout != torch.strided:
        raise UnsupportedModelError(
            f"the weight {name} is a {type(weight).__name__}, which an engine's file of weights cannot hold; export "
            "the model before it is quantised or converted"
        )
    return weight.detach().contiguous()


def _dynamic(value: Tensor, longest: int) -> dict[int, object] | None:
    dynamic = {
        axis: torch.export.Dim.DYNAMIC(min=SHORTEST, max=longest)
        for axis, size in enumerate(value.shape)
        if isinstance(size, torch.SymInt)
    }
    return dynamic or None


def _targets(program: ExportedProgram) -> Iterator[torch._ops.OpOverload]:
    """Every operator that a program calls, in the bodies of its loops too."""
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.OpOverload):
                    yield node.target
