"""All kernels, one row each, and which of them serves which call of a decode graph."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Sequence

from torch.fx import GraphModule

from xkv_fx.errors import BackendError
from xkv_fx.lowering.kernels import attention_cpu, attention_triton, linear_cpu, torch_ops
from xkv_fx.lowering.kernels.kernel import Call, Choice, Kernel, Op, Refusal

KERNELS: tuple[Kernel, ...] = (
    attention_cpu.KERNEL,
    attention_triton.KERNEL,
    linear_cpu.KERNEL,
    linear_cpu.INT8_KERNEL,
    *torch_ops.KERNELS,
)
"""The first that accepts a call serves it, so that those which serve any call stand last."""


def choose_kernels(module: GraphModule, kernels: Sequence[Kernel] = KERNELS) -> tuple[Choice, ...]:
    """Put a kernel in the place of every call that there are kernels for.

    Args:
        module: a decode graph whose weights are inputs; it is changed.
        kernels: the table.

    Returns:
        which kernel serves each call, in the order of the graph.

    Raises:
        BackendError: a kernel cannot be built, Triton is missing for a GPU, or no kernel serves a call.
    """
    choices = []
    served: dict[tuple[Kernel, Hashable], list[Call]] = {}
    for call in _calls(module, kernels):
        kernel, refusals = _first_that_accepts(call, kernels)
        choices.append(Choice(call.op.name, call.node.name, kernel.name, kernel.device, refusals))
        key = call.node if kernel.together is None else kernel.together(call)
        served.setdefault((kernel, key), []).append(call)
    for (kernel, _), calls in served.items():
        kernel.use(calls)
    module.recompile()
    return tuple(choices)


def describe_choices(choices: Sequence[Choice], kernels: Sequence[Kernel] = KERNELS) -> str:
    """Who serves how many calls of each op, and why others do not, for people."""
    by_op = (_described(op, [choice for choice in choices if choice.op == op.name]) for op in _ops(kernels))
    return "; ".join(filter(None, by_op))


def _described(op: Op, choices: Sequence[Choice]) -> str:
    counted = collections.Counter(map(str, choices))
    return ", ".join(
        f"{op.counted.format(served=served, total=len(choices))} by {code}" for code, served in counted.items()
    )


def _ops(kernels: Sequence[Kernel]) -> list[Op]:
    return list(dict.fromkeys(kernel.op for kernel in kernels))


def _calls(module: GraphModule, kernels: Sequence[Kernel]) -> list[Call]:
    ops = _ops(kernels)
    return [Call(op, node) for node in module.graph.nodes for op in ops if op.read(node) is not None]


def _first_that_accepts(call: Call, kernels: Sequence[Kernel]) -> tuple[Kernel, tuple[Refusal, ...]]:
    refusals: list[Refusal] = []
    for kernel in kernels:
        if kernel.op != call.op:
            continue
        if kernel.device not in (None, call.device):
            refusals.append(Refusal(kernel.name, f"device {call.device}", elsewhere=True))
            continue
        why = kernel.accepts(call)
        if why is None:
            return kernel, tuple(refusals)
        refusals.append(Refusal(kernel.name, why))
    reasons = "; ".join(f"{refusal.kernel}: {refusal.why}" for refusal in refusals)
    raise BackendError(f"no kernel serves {call.node.name}, {call.op.name} ({reasons}); backend='eager' needs none")
