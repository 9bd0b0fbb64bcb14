"""The table of kernels: the first that accepts a call serves it, and what others say is kept; a new one is a row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import linear

from xkv_fx.errors import BackendError, PassError
from xkv_fx.lowering.kernels.kernel import Call, Choice, Kernel, Refusal
from xkv_fx.lowering.kernels.linear import LINEAR
from xkv_fx.lowering.kernels.table import KERNELS, choose_kernels, describe_choices
from xkv_fx.passes.tools.graph import calls, emit

aten = torch.ops.aten


class Layers(nn.Module):
    def forward(self, x: Tensor, wide: Tensor, narrow: Tensor, odd: Tensor) -> Tensor:
        return linear(x, wide) + linear(x, narrow) + linear(x[..., :24], odd)


INPUTS = tuple(torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in [(2, 32), (6, 32), (1, 32)])
INPUTS = (*INPUTS, torch.randn(6, 24, generator=torch.Generator().manual_seed(1)))


def graph(module: nn.Module, *inputs: Tensor) -> GraphModule:
    exported = torch.export.export(module, inputs).module(check_guards=False)
    assert isinstance(exported, GraphModule)
    return exported


def narrow_only(call: Call) -> str | None:
    """A toy: it serves layers of one output, by a sum of products."""
    width = call.values["weight"].shape[0]
    return None if width == 1 else f"{width} outputs"


def use_sum(served: Sequence[Call]) -> None:
    for call in served:
        graph = call.node.graph
        with graph.inserting_before(call.node):
            products = emit(graph, aten.mul.Tensor, call.given["x"], call.given["weight"])
            call.node.replace_all_uses_with(emit(graph, aten.sum.dim_IntList, products, [-1], True))
        graph.erase_node(call.node)


TOY = Kernel(LINEAR, "toy kernel", narrow_only, use_sum)


def test_a_new_kernel_is_one_row() -> None:
    module = graph(Layers(), *INPUTS)
    choices = choose_kernels(module, (TOY, *KERNELS))
    assert choices == (
        Choice("linear layer", "linear", "CPU kernel", "cpu", (Refusal("toy kernel", "6 outputs"),)),
        Choice("linear layer", "linear_1", "toy kernel", None, ()),
        Choice(
            "linear layer", "linear_2", "torch ops", None,
            (Refusal("toy kernel", "6 outputs"), Refusal("CPU kernel", "24 inputs are not a multiple of 16")),
        ),
    )  # fmt: skip
    assert describe_choices(choices) == (
        "1 of 3 linear layers by CPU kernel (toy kernel: 6 outputs), 1 of 3 linear layers by toy kernel, "
        "1 of 3 linear layers by torch ops (toy kernel: 6 outputs; CPU kernel: 24 inputs are not a multiple of 16)"
    )
    assert len(calls(module, torch.ops.xkv.linear_cpu.default)) == len(calls(module, aten.linear.default)) == 1
    assert len(calls(module, aten.sum.dim_IntList)) == 1
    torch.testing.assert_close(module(*INPUTS), Layers()(*INPUTS))


def test_a_kernel_for_another_device_is_not_asked() -> None:
    def never(call: Call) -> str | None:
        raise AssertionError(call)

    elsewhere = dataclasses.replace(TOY, accepts=never, device="cuda")
    choices = choose_kernels(graph(Layers(), *INPUTS), (elsewhere, *KERNELS))
    assert [choice.kernel for choice in choices] == ["CPU kernel", "CPU kernel", "torch ops"]
    assert {choice.refusals[0] for choice in choices} == {Refusal("toy kernel", "device cpu", elsewhere=True)}
    assert str(choices[0]) == "CPU kernel"
    assert str(choices[2]) == "torch ops (CPU kernel: 24 inputs are not a multiple of 16)"


def test_where_no_kernel_is_for_a_device_that_is_said() -> None:
    foreign = [kernel if kernel.device is None else dataclasses.replace(kernel, device="tpu") for kernel in KERNELS]
    choices = choose_kernels(graph(Layers(), *INPUTS), foreign)
    assert describe_choices(choices) == "3 of 3 linear layers by torch ops (CPU kernel: device cpu)"


def test_calls_that_belong_together_are_handed_over_at_once() -> None:
    handed: list[list[str]] = []
    keys = {6: "six", 1: "one"}
    kernel = dataclasses.replace(
        TOY,
        accepts=lambda call: None,
        use=lambda served: handed.append([call.node.name for call in served]),
        together=lambda call: keys[call.values["weight"].shape[0]],
    )
    choose_kernels(graph(Layers(), *INPUTS), (kernel,))
    assert handed == [["linear", "linear_2"], ["linear_1"]]


def test_a_call_that_no_kernel_serves_is_an_error() -> None:
    with pytest.raises(BackendError, match=r"no kernel serves linear, linear layer \(toy kernel: 6 outputs\)"):
        choose_kernels(graph(Layers(), *INPUTS), (TOY,))


def test_a_call_that_was_replaced_has_no_arguments() -> None:
    module = graph(Layers(), *INPUTS)
    call = Call(LINEAR, calls(module, aten.linear.default)[0])
    call.node.target = aten.matmul.default
    with pytest.raises(PassError, match="no call of linear layer any more"):
        _ = call.given


class Adapter(nn.Module):
    def forward(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return linear(linear(x, down), up)


def test_a_layer_whose_input_is_a_layer_reads_what_took_its_place() -> None:
    """Adapters of rank 16 are such layers."""
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(shape, generator=generator) for shape in ((2, 3, 32), (16, 32), (5, 16)))
    module = graph(Adapter(), *inputs)
    assert [choice.kernel for choice in choose_kernels(module)] == ["CPU kernel"] * 2
    module.graph.lint()
    torch.testing.assert_close(module(*inputs), Adapter()(*inputs))


@pytest.mark.parametrize(
    ("x", "weight", "why"),
    [
        (torch.empty(2, 32, dtype=torch.float64), torch.empty(3, 32, dtype=torch.float64), "dtype torch.float64"),
        (torch.empty(65, 32), torch.empty(3, 32), "65 rows are more than 64"),
        (torch.empty(2, 20), torch.empty(3, 20), "20 inputs are not a multiple of 16"),
        (torch.empty(2, 32), torch.empty(32, 3).T, "not contiguous"),
        (torch.empty(2, 32), torch.empty(32), "weights of 1 dimensions"),
    ],
    ids=lambda value: "" if isinstance(value, Tensor) else value.split()[-1],
)
def test_linear_layers_that_stay_torchs_own_say_why(x: Tensor, weight: Tensor, why: str) -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return linear(x, weight)

    module = graph(Layer(), x, weight)
    (choice,) = choose_kernels(module)
    assert choice.kernel == "torch ops"
    assert why in str(choice)
    assert len(calls(module, aten.linear.default)) == 1
    assert math.prod(module(x, weight).shape) >= 1
