"""New states are returned instead of changed copies of old ones, where that is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from xkv_fx.capture.export import export_step
from xkv_fx.passes.prepare.return_states import ReturnStates
from xkv_fx.passes.tools.graph import calls

aten = torch.ops.aten


class Step(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.forward = function


def rolled(token: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    held = state.clone()
    full = torch.cat((held, token), 1)
    return full.sum(1), held.copy_(full[:, 1:])


def read_before(token: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    held = state.clone()
    seen = held[:, 1:].sum(1)
    return seen, held.copy_(held * 2 + token)


def read_after(token: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    held = state.clone()
    new = held.copy_(held + token)
    return held.sum(1), new


def read_after_through_a_view(token: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    held = state.clone()
    part = held[:, 1:]
    new = held.copy_(held + token)
    return part.sum(1), new


def from_a_view_of_the_state(token: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    held = state.clone()
    return token.sum(1), held.copy_(state.flip(1).transpose(0, 1).reshape(state.shape)), held.copy_(state[:])


def of_another_dtype(token: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    held = state.clone()
    return token.sum(1), held.copy_((held + token).double())


@pytest.mark.parametrize(
    ("function", "copies"),
    [
        (rolled, 0),
        (read_before, 0),
        (read_after, 1),
        (read_after_through_a_view, 1),
        (from_a_view_of_the_state, 2),
        (of_another_dtype, 1),
    ],
)
def test_what_is_computed_stays(function: Callable[..., tuple[Tensor, ...]], copies: int) -> None:
    token, state = torch.randn(2, 1), torch.randn(2, 4)
    graph = export_step(Step(function), (token, state))
    before, expected = state.clone(), function(token, state)
    record = ReturnStates()(graph)
    for ours, theirs in zip(graph(token, state), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(state, before)
    assert len(calls(graph, aten.copy_.default)) == copies
    assert record.changed == (copies == 0)
