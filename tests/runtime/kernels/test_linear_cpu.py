"""The CPU kernel of linear layers against torch's own, and which layers of a graph it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import linear as linear_of_torch

from xkv_fx.lowering.choose_linear import choose_linear
from xkv_fx.passes.graph import calls
from xkv_fx.runtime.kernels import linear_cpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    linear_cpu.build(x.dtype)
    out: Tensor = torch.ops.xkv.linear_cpu(x, weight, bias)
    return out


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
    torch.library.opcheck(torch.ops.xkv.linear_cpu.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.xkv.linear_cpu.default, (x, weight))


class Layers(nn.Module):
    def forward(self, x: Tensor, wide: Tensor, bias: Tensor, narrow: Tensor, turned: Tensor) -> Tensor:
        taken = linear_of_torch(x, wide, bias)
        made = linear_of_torch(x, wide * 2)  # no weight as it lies
        return taken + made + linear_of_torch(x[..., :24], narrow) + linear_of_torch(x, turned.T)


def test_layers_that_do_not_fit_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 32), (6, 32), (6,), (6, 24), (32, 6))
    inputs = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    exported = torch.export.export(Layers(), inputs).module(check_guards=False)
    assert isinstance(exported, GraphModule)
    said = choose_linear(exported)
    assert said.startswith("1 of 4 linear layers")
    assert len(calls(exported, torch.ops.xkv.linear_cpu.default)) == 1
    torch.testing.assert_close(exported(*inputs), Layers()(*inputs))
