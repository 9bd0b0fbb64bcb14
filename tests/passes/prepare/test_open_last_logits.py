"""The slice that leaves the last column alone is undone, wherever between model and logits it stands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_checks import assert_meta_is_true, export
from torch import Tensor

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.prepare.open_last_logits import OpenLastLogits

WEIGHT = torch.arange(12.0).view(4, 3)


def whole(x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.cumsum(1), WEIGHT.to(x.device))


def before_projection(x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.cumsum(1)[:, -1:], WEIGHT.to(x.device))


def before_projection_and_cap(x: Tensor) -> Tensor:
    return torch.tanh(before_projection(x) / 30.0) * 30.0


def summed(x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.sum(1, keepdim=True), WEIGHT.to(x.device))


@pytest.mark.parametrize("function", [before_projection, before_projection_and_cap])
def test_all_columns_are_back(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    module = export(function, torch.zeros(2, 5, 3))
    record = OpenLastLogits()(module)
    assert (record.matched, record.changed) == (1, 1)
    assert module(x).shape == (2, 7, 4)
    for length in range(1, 8):
        torch.testing.assert_close(module(x)[:, length - 1 : length], function(x[:, :length]))
    assert_meta_is_true(module, x)


@pytest.mark.parametrize("function", [whole, summed])
def test_anything_else_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedModelError, match="logits of one token"):
        OpenLastLogits()(export(function, torch.zeros(2, 5, 3)))
