"""A prompt's graph that is run a layer at a time does what it does at once."""

from __future__ import annotations

import pytest
import torch
from ready_models import captured
from tiny_models import random_ids

from xkv_fx import Budgets
from xkv_fx.errors import BackendError
from xkv_fx.lowering.program import CompiledProgram, compile_program, one_row_prompts
from xkv_fx.runtime.session import Session


def program(layers: int = 3) -> CompiledProgram:
    return compile_program(captured(layers=layers, rows=2), Budgets((12, 9, 17)[:layers]), "eager")


@pytest.mark.parametrize("turns", [1, 2])
def test_logits_and_state_are_the_same_to_the_bit(turns: int) -> None:
    source = program()
    whole, parts = Session(source), Session(source)
    for turn in range(turns):
        ids = random_ids(2, 20, seed=turn)
        expected = whole.feed(ids)
        feeding = parts.begin_feed(ids)
        running = source.prompt_in_parts(feeding.kind, *feeding.inputs, *parts.state.tensors)
        found = [running.advance() for _ in range(running.parts)]
        parts.end_feed(feeding)
        assert len(found) == 3 + 1  # one a layer, and what is behind the last
        assert [logits is None for logits in found] == [True, True, True, False]
        assert found[-1] is not None
        assert torch.equal(found[-1], expected)
        for one, other in zip(whole.state.tensors, parts.state.tensors, strict=True):
            assert torch.equal(one, other)
    assert whole.history == parts.history
    assert torch.equal(whole.transcript.ids, parts.transcript.ids)


def test_a_part_leaves_nothing_behind_that_no_later_one_needs() -> None:
    source, session = program(), Session(program())
    feeding = session.begin_feed(random_ids(2, 20))
    running = source.prompt_in_parts(feeding.kind, *feeding.inputs, *session.state.tensors)
    held = []
    while running.advance() is None:
        held.append(sum(value.numel() for value in running.held if isinstance(value, torch.Tensor)))
    assert held[0] > held[1] > held[2], "the caches of layers that have run are let go, and nothing is added"
    assert not running.held


def test_a_program_of_one_row_feeds_prompts_only() -> None:
    prompts = one_row_prompts(program(), captured(layers=3, rows=1))
    assert prompts.plan.rows == 1
    session = Session(prompts)
    expected = Session(program()).feed(random_ids(1, 20).expand(2, -1))[:1]
    torch.testing.assert_close(session.feed(random_ids(1, 20)), expected)
    with pytest.raises(BackendError, match="no decode graph"):
        session.step(random_ids(1, 1))
