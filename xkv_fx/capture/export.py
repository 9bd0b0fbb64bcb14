"""From a module to the graph that the passes work on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.fx import GraphModule
from torch.fx import config as fx_config
from torch.fx.graph import CodeGen
from torch.overrides import TorchFunctionMode

from xkv_fx.errors import UnsupportedModelError, XkvError, first_line
from xkv_fx.passes.prepare.clean_graph import CleanGraph
from xkv_fx.passes.tools.graph import arguments, at_length, output_node, placeholders

aten = torch.ops.aten
UNBOUNDED = 2**20
NO_TRACES = "do_not_emit_stack_traces"
"""The setting of `torch.fx.config`; older torch has none, and ignores it."""


def export_graph(
    module: nn.Module, inputs: tuple[Tensor, Tensor], longest: int | None = None, alone: bool = False
) -> tuple[GraphModule, int | None]:
    """The graph of a module of `(input_ids, position_ids)`; plain positional inputs, one plain output, weights shared.

    Args:
        inputs: int64 `[rows, S]` each. With S = 1 all sizes are static, otherwise S is left open.
        longest: the largest S; None for no limit.
        alone: refuse a module that talks to other processes, since nobody knows which parts of the model they hold.

    Returns:
        the cleaned graph, and the largest S for which it matches the module; None if there is no limit.

    Raises:
        UnsupportedModelError: the module branches on S, is random, or talks to other processes.
    """
    exported, longest = uncleaned_graph(module, inputs, longest)
    if alone:
        _check_alone(exported.graph)
    CleanGraph()(exported)
    return exported, longest


def export_step(module: nn.Module, inputs: tuple[Tensor, ...]) -> GraphModule:
    """The graph of a module that takes tensors and returns a tuple of tensors, all sizes static; weights are shared.

    Raises:
        UnsupportedModelError: the module is random.
    """
    with torch.no_grad(), _as_ops_without_traces(), _without_warnings():
        exported: Any = torch.export.export(module, inputs, strict=False).module(check_guards=False)
    exported.graph.set_codegen(CodeGen())
    _check_not_random(exported.graph)
    CleanGraph()(exported)
    return cast(GraphModule, exported)


def uncleaned_graph(
    module: nn.Module, inputs: tuple[Tensor, Tensor], longest: int | None = None
) -> tuple[GraphModule, int | None]:
    """As `export_graph`, with all that `torch.export` leaves in a graph; to be recompiled before it is run."""
    length = torch.export.Dim("length", min=2, max=longest or UNBOUNDED)
    dynamic = None if inputs[0].shape[1] == 1 else ({1: length}, {1: length})
    with torch.no_grad(), _as_ops_without_traces(), _without_warnings():
        exported, longest = _exported(module, inputs, dynamic, longest)
    graph = exported.graph
    graph.set_codegen(CodeGen())
    for node, name in zip(placeholders(graph).values(), ("input_ids", "position_ids"), strict=True):
        node.target = name  # fixed names, whatever the module calls them, so that inputs added by passes cannot clash
        node._rename(name)
    output = output_node(graph)
    output.args = (cast(Any, output.args[0])[0],)
    _check_not_random(graph)
    return exported, longest


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence what torch's own modules warn of while they trace; users cannot act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
        yield


@contextmanager
def _as_ops_without_traces() -> Iterator[None]:
    """Trace every op on its own and record no call stacks: nobody reads them, and they take a tenth of the time."""
    fast_path, traces = torch.backends.mha.get_fastpath_enabled(), getattr(fx_config, NO_TRACES, False)
    torch.backends.mha.set_fastpath_enabled(False)  # it would hide attention in one op that cannot be looked into
    setattr(fx_config, NO_TRACES, True)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        setattr(fx_config, NO_TRACES, traces)


class OneGradMode(TorchFunctionMode):
    """Ignore a model's attempts to switch gradients on or off; they stay off while graphs are made.

    To be entered in a forward that is being exported: `torch.export` would note each switch as a node, cut the graph at
    these nodes and join it again, which took a tenth of the time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            return None
        return func(*args, **(kwargs or {}))


def _check_alone(graph: torch.fx.Graph) -> None:
    for node in graph.nodes:
        if getattr(node.target, "namespace", "") in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            raise UnsupportedModelError(
                f"{node.name} talks to other processes ({node.target}); of models that are split among processes, only "
                "those are taken that transformers splits by its tensor-parallel plans"
            )


def _check_not_random(graph: torch.fx.Graph) -> None:
    for node in graph.nodes:
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        given = arguments(node)
        if any(given.get(name) for name in ("train", "dropout_p")) or not {"train", "dropout_p"} & given.keys():
            raise UnsupportedModelError(f"{node.name} is random, {node.target}; switch dropout off")


def _exported(
    module: nn.Module, inputs: tuple[Tensor, Tensor], dynamic: Any, longest: int | None
) -> tuple[GraphModule, int | None]:
    """Guards that torch cannot prove for every length become assertions in the graph, which bound the length."""
    try:
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
        return program.module(check_guards=False), longest
    except UserError as error:
        try:
            program = torch.export.export(
                module, inputs, dynamic_shapes=dynamic, strict=False, prefer_deferred_runtime_asserts_over_guards=True
            )
        except Exception:  # whatever the second try raises, the guards of the first say why
            raise UnsupportedModelError(f"it branches on the number of tokens: {_guards(error)}") from error
    exported: Any = program.module(check_guards=False)
    held = _held_up_to(exported, longest or UNBOUNDED, inputs[0].shape[1])
    return exported, held if longest is not None or held < UNBOUNDED else None


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Whatever goes wrong while a model is traced means that it cannot be captured.

    Args:
        name: of the model's class.
    """
    try:
        yield
    except UnsupportedModelError as error:
        if name in str(error):
            raise
        raise UnsupportedModelError(f"{name} cannot be captured: {error}") from error
    except XkvError:
        raise
    except Exception as error:  # of the model's own code, which may raise anything while it is traced
        raise UnsupportedModelError(f"{name} cannot be captured: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Why a module could not be traced, in one line."""
    reason = first_line(error)
    if "data-dependent" in reason:
        return f"it branches on what the tokens are, or loops over what was chosen for them ({reason.strip()})"
    return reason


def _guards(error: Exception) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip().startswith("-")]
    first = (lines or str(error).splitlines())[0]
    return "it takes one length only" if "specialized it to be a constant" in first else first


def _held_up_to(module: GraphModule, longest: int, example: int) -> int:
    """The largest length for which a graph's assertions hold, and hold for all shorter lengths too.

    Each assertion compares formulas of the length with numbers, so it can start or stop holding only near these.
    """
    for node in module.graph.nodes:
        if node.target is not aten._assert_scalar.default or not isinstance(node.args[0], torch.fx.Node):
            continue
        condition = node.args[0].meta.get("val")
        if not isinstance(condition, torch.SymBool):
            continue
        formula = condition.node.expr
        if len(formula.free_symbols) > 1 or any(str(symbol).startswith("u") for symbol in formula.free_symbols):
            raise UnsupportedModelError(f"it branches on its tokens ({formula})")
        near = {int(atom) + step for atom in formula.atoms() if atom.is_Integer for step in range(-3, 4)}
        for length in sorted({*range(2, 130), *near, longest}):
            if 2 <= length <= longest and not at_length(formula, length):
                longest = length - 1
        if longest < example:
            raise UnsupportedModelError(
                f"it branches on the number of tokens: {formula} does not hold for {longest + 1}"
            )
    return longest
