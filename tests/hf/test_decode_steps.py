"""A tight decode loop against transformers' generate, for both kinds of transformed models."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from plain_models import decoder, sdpa
from tiny_models import llama, random_ids
from torch import Tensor

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.errors import CapacityError, PromptError, SessionError
from xkv_fx.hf.cache import SessionCache
from xkv_fx.hf.generation import BudgetedLM

IDS = random_ids(2, 30)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


@functools.cache
def transformed() -> BudgetedLM:
    return xkv_fx.transform(llama(2), Budgets((10, 16)), batch_size=2, backend="eager", check=False)


def fed(llm: BudgetedLM, **options: Any) -> tuple[SessionCache, Tensor]:
    """A session that has seen the prompt, and the tokens chosen behind it."""
    session = llm.new_session()
    logits = llm(IDS, past_key_values=session, logits_to_keep=1, **options).logits
    return session, logits.argmax(-1)


def test_its_tokens_are_those_of_generate() -> None:
    expected = transformed().generate(IDS, **GREEDY)
    session, first = fed(transformed())
    tokens = transformed().decode_steps(11, session, first)
    assert torch.equal(torch.cat((IDS, first, tokens), 1), expected)
    assert session.tokens_seen.tolist() == [41, 41]
    assert session.get_seq_length() == 41


def test_padded_rows() -> None:
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :13] = 0
    expected = transformed().generate(IDS, attention_mask=mask, **GREEDY)
    session, first = fed(transformed(), attention_mask=mask)
    assert torch.equal(transformed().decode_steps(11, session, first), expected[:, 31:])


def test_it_goes_on_where_it_ended() -> None:
    session, first = fed(transformed())
    at_once = transformed().decode_steps(9, session, first)
    session, first = fed(transformed())
    some = transformed().decode_steps(4, session, first)
    assert torch.equal(torch.cat((some, transformed().decode_steps(5, session, some[:, -1:])), 1), at_once)


def test_rows_that_are_over_are_filled_up_and_end_it() -> None:
    session, first = fed(transformed())
    free = transformed().decode_steps(11, session, first)
    ends = (int(free[0, 2]), int(free[1, 5]))
    over = [next(i for i, token in enumerate(row.tolist()) if token in ends) for row in free]
    session, first = fed(transformed())
    tokens = transformed().decode_steps(11, session, first, end_tokens=ends, pad_token=60)
    assert tokens.shape[1] == max(over) + 1
    for row, end in enumerate(over):
        assert tokens[row, : end + 1].tolist() == free[row, : end + 1].tolist()
        assert tokens[row, end + 1 :].tolist() == [60] * (max(over) - end)


def test_sampling_is_seeded_and_draws_from_the_likeliest() -> None:
    def draw(seed: int, **options: Any) -> Tensor:
        session, first = fed(transformed())
        generator = torch.Generator().manual_seed(seed)
        return transformed().decode_steps(11, session, first, do_sample=True, generator=generator, **options)

    session, first = fed(transformed())
    assert torch.equal(draw(0, top_k=1), transformed().decode_steps(11, session, first))
    assert torch.equal(draw(1, temperature=5.0), draw(1, temperature=5.0))
    assert not torch.equal(draw(1, temperature=5.0), draw(2, temperature=5.0))


def test_a_plain_module() -> None:
    model, ids = decoder(sdpa).eval(), random_ids(2, 20)
    positions = torch.arange(20).expand(2, -1)
    llm = xkv_fx.transform(
        model, Budgets((8, 8)), batch_size=2, backend="eager", check=False, example_inputs=(ids, positions)
    )
    expected = llm.generate(ids, 9)
    session = llm.new_session()
    first = session.feed(ids)[:, -1].argmax(-1, keepdim=True)
    assert torch.equal(torch.cat((ids, first, llm.decode_steps(8, session, first)), 1), expected)


def test_capacity_is_checked_as_by_a_step() -> None:
    llm = transformed().with_budgets(Budgets((10, 16), Policy(eviction="append")), max_new_tokens=3)
    session, first = fed(llm)
    with pytest.raises(CapacityError, match=r"4 new tokens are asked for, and 3 can be .* 3 appended tokens"):
        llm.decode_steps(4, session, first)
    assert session.tokens_seen.tolist() == [30, 30], "nothing was fed"
    assert llm.decode_steps(3, session, first).shape == (2, 3)


@pytest.mark.parametrize("n", [0, -1, True, 1.5])
def test_counts_are_checked(n: Any) -> None:
    session, first = fed(transformed())
    with pytest.raises(PromptError, match="n must be"):
        transformed().decode_steps(n, session, first)


@pytest.mark.parametrize("wrong", [{"end_tokens": bad} for bad in (5, (-1,), ("a",), [True])] + [{"pad_token": -1}])
def test_tokens_are_checked_before_anything_is_decoded(wrong: dict[str, Any]) -> None:
    session, first = fed(transformed())
    with pytest.raises(PromptError, match="at least 0"):
        transformed().decode_steps(2, session, first, **wrong)
    assert session.tokens_seen.tolist() == [30, 30]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": float("nan")}, {"top_k": 0}], ids=str)
def test_options_are_checked_before_anything_is_decoded(options: dict[str, Any]) -> None:
    session, first = fed(transformed())
    with pytest.raises(PromptError):
        transformed().decode_steps(2, session, first, do_sample=True, **options)
    assert session.tokens_seen.tolist() == [30, 30]


def test_sessions_are_checked() -> None:
    _, first = fed(transformed())
    with pytest.raises(SessionError, match="no session"):
        transformed().decode_steps(1, None, first)
    other = transformed().with_budgets(Budgets((4, 4)))
    with pytest.raises(SessionError, match="another transformed model"):
        transformed().decode_steps(1, other.new_session(), first)
    session, _ = fed(transformed())
    with pytest.raises(PromptError, match="one token a row"):
        transformed().decode_steps(1, session, IDS)
