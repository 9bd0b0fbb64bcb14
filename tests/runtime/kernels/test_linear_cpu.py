"""The CPU kernel of linear layers against torch's own, and which layers of a graph it takes."""

from __future__ import annotations

import pytest
import torch
from exhaustive import exhaustive
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import linear as linear_of_torch

from xkv_fx.lowering.kernels.table import choose_kernels, describe_choices
from xkv_fx.passes.tools.graph import calls
from xkv_fx.runtime.kernels import linear_cpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    linear_cpu.build(x.dtype)
    out: Tensor = torch.ops.xkv.linear_cpu(x, [weight], [] if bias is None else [bias])
    return out.view(-1, weight.shape[0])


def inputs(rows: int, width: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, depth), (width, depth), (width,)))
    return x.to(dtype), (weight / depth**0.5).to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_it_is_a_linear_layer(dtype: torch.dtype) -> None:
    for rows in (*range(1, 14), 16, 33, 64):
        for width, depth in ((1, 16), (7, 48), (37, 160)):
            x, weight, bias = inputs(rows, width, depth, dtype)
            expected = x.double() @ weight.double().T
            tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
            torch.testing.assert_close(linear(x, weight).double(), expected, **tolerance)
            torch.testing.assert_close(linear(x, weight, bias).double(), expected + bias.double(), **tolerance)


def test_sums_are_rounded_once_to_the_nearest() -> None:
    x, weight, _ = inputs(9, 40, 320, torch.bfloat16)
    exact = (x.double() @ weight.double().T).float()
    assert torch.equal(linear(x, weight), exact.bfloat16())


def test_nan_and_infinity_come_through() -> None:
    x, weight, _ = inputs(3, 8, 16, torch.bfloat16)
    x[0, 3], x[1, 0] = float("nan"), float("inf")
    out = linear(x, weight)
    assert out[0].isnan().all()
    assert out[1].isinf().all()
    assert out[2].isfinite().all()


def test_leading_dimensions_are_one_and_views_are_read_as_they_look() -> None:
    x, weight, _ = inputs(6, 5, 32, torch.float32)
    seen_through = torch.stack((x, x), -1)[..., 0].view(2, 3, 32)
    assert torch.equal(linear(seen_through, weight), linear(x, weight))


def test_registration_is_sound() -> None:
    x, weight, bias = inputs(2, 5, 32, torch.float32)
    linear_cpu.build(torch.float32)
    torch.library.opcheck(torch.ops.xkv.linear_cpu.default, (x, [weight, weight], [bias, bias]))
    torch.library.opcheck(torch.ops.xkv.linear_cpu.default, (x, [weight], []))


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_layers_of_one_input_are_those_layers(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 48, generator=generator)
    weights = [torch.randn(width, 48, generator=generator) for width in (16, 1, 37, 2)]
    biases = [torch.randn(len(weight), generator=generator) for weight in weights]
    linear_cpu.build(torch.float32)
    for given in ([], biases):
        out = torch.ops.xkv.linear_cpu(x, weights, given)
        parts = (
            [linear(x, *layer) for layer in zip(weights, given, strict=True)]
            if given
            else map(linear, [x] * 4, weights)
        )
        assert torch.equal(out, torch.cat([part.flatten() for part in parts]))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=exhaustive)], ids=str
)
def test_weights_of_whole_numbers(dtype: torch.dtype) -> None:
    linear_cpu.build(dtype, int8=True)
    for rows in (1, 4, 9):
        x, _, _ = inputs(rows, 1, 48, dtype)
        weight = torch.randint(-128, 128, (19, 48), dtype=torch.int8, generator=torch.Generator().manual_seed(rows))
        out = torch.ops.xkv.linear_cpu(x, [weight], []).view(rows, 19).double()
        tolerance = {"rtol": TOLERANCE[dtype], "atol": 100 * TOLERANCE[dtype]}
        torch.testing.assert_close(out, x.double() @ weight.double().T, **tolerance)


class Quantized(nn.Module):
    def forward(self, first: Tensor, second: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        x = x * 2
        one, other = (torch.mm(x.reshape(-1, 32), weight.t().to(x.dtype)) * scale for weight in (first, second))
        return torch.mm(one, other.t()) + torch.mm(one, other)


def test_int8_layers_of_one_input_are_one_call() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(-128, 128, (6, 32), dtype=torch.int8, generator=generator) for _ in range(2))
    inputs = (first, second, torch.rand(6, generator=generator), torch.randn(3, 2, 32, generator=generator))
    exported = torch.export.export(Quantized(), inputs).module(check_guards=False)
    assert isinstance(exported, GraphModule)
    assert "2 of 2 linear layers" in describe_choices(choose_kernels(exported))
    kernels = calls(exported, torch.ops.xkv.linear_cpu.default)
    assert [len(node.args[1]) for node in kernels] == [2]  # type: ignore[arg-type]
    torch.testing.assert_close(exported(*inputs), Quantized()(*inputs), rtol=1e-5, atol=1e-3)


def test_layers_that_do_not_belong_together_are_refused() -> None:
    x, weight, bias = inputs(2, 5, 32, torch.float32)
    linear_cpu.build(torch.float32)
    with pytest.raises(RuntimeError, match="as deep as x"):
        torch.ops.xkv.linear_cpu(x, [weight, weight[:, :16].contiguous()], [])
    with pytest.raises(RuntimeError, match="of the dtype of x, or all int8"):
        torch.ops.xkv.linear_cpu(x, [weight, weight.to(torch.int8)], [])
    with pytest.raises(RuntimeError, match="has a bias, or none"):
        torch.ops.xkv.linear_cpu(x, [weight, weight], [bias])
    for wrong in (bias[:-1], bias.repeat_interleave(2)[::2]):
        with pytest.raises(RuntimeError, match="a number for each output"):
            torch.ops.xkv.linear_cpu(x, [weight], [wrong])


class Layers(nn.Module):
    def forward(self, x: Tensor, wide: Tensor, bias: Tensor, narrow: Tensor, transposed: Tensor) -> Tensor:
        taken = linear_of_torch(x, wide, bias)
        too, bare = linear_of_torch(x, wide, bias + 1), linear_of_torch(x, wide)
        made = linear_of_torch(x, wide * 2)  # no weight as it lies
        also = taken + too + bare + linear_of_torch(x, wide, bias)
        return also + made + linear_of_torch(x[..., :24], narrow) + linear_of_torch(x, transposed.T)


def test_layers_that_do_not_fit_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 32), (6, 32), (6,), (6, 24), (32, 6))
    inputs = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    exported = torch.export.export(Layers(), inputs).module(check_guards=False)
    assert isinstance(exported, GraphModule)
    said = describe_choices(choose_kernels(exported))
    assert said.startswith("3 of 7 linear layers")
    kernels = calls(exported, torch.ops.xkv.linear_cpu.default)
    assert [len(node.args[1]) for node in kernels] == [2, 1]  # type: ignore[arg-type]  # with a bias, and without
    torch.testing.assert_close(exported(*inputs), Layers()(*inputs))
