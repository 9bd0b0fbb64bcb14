"""A session under either of the names that versions of transformers have for a cache: it is used, or an error says why.

From 5.24 on, transformers calls it `cache`, and takes a cache without layers of its own for one of linear attention,
for which it does not slice a conversation.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from batches import padded
from ready_models import FULL, full, model, transformed
from tiny_models import random_ids
from torch import Tensor
from transformers import DynamicCache

from xkv_fx import Budgets
from xkv_fx.errors import CapacityError, PromptError, SessionError
from xkv_fx.hf.cache import SessionCache
from xkv_fx.hf.cache_name import CACHE_NAME, CACHE_NAMES, CHUNKS_HOLD_NEW_TOKENS, cache_given

NAMES = ["past_key_values", "cache"]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
ROWS = [random_ids(1, length, seed=length) for length in (9, 4, 1, 13)]


def grown(conversation: Tensor, turn: int = 5) -> Tensor:
    return torch.cat((conversation, random_ids(conversation.shape[0], turn, seed=turn)), 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_goes_on(name: str) -> None:
    llm, conversation = full(), random_ids(1, 7)
    session = llm.new_session()
    for turn in range(3):
        expected = model().generate(conversation, do_sample=False, max_new_tokens=5)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # transformers' own about its older name
            conversation = llm.generate(conversation, do_sample=False, max_new_tokens=5, **{name: session})
        assert torch.equal(conversation, expected)
        assert session.tokens_seen.tolist() == [conversation.shape[1] - 1]
        conversation = grown(conversation, turn + 1)


@pytest.mark.parametrize("name", NAMES)
def test_full_budgets_hold_as_many_tokens_as_they_say(name: str) -> None:
    llm = full()
    session = llm.new_session()
    conversation = llm.generate(random_ids(1, FULL - 20), do_sample=False, max_new_tokens=5, **{name: session})
    conversation = grown(conversation)
    got = llm.generate(conversation, do_sample=False, max_new_tokens=11, **{name: session})
    assert torch.equal(got, model().generate(conversation, do_sample=False, max_new_tokens=11))
    assert session.tokens_seen.tolist() == [FULL]
    with pytest.raises(CapacityError, match=f"{FULL + 1} tokens do not fit into the {FULL} slots"):
        llm.generate(got, do_sample=False, max_new_tokens=1, **{name: session})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_conversation_goes_on(name: str, side: str) -> None:
    llm = full(rows=4)
    session = llm.new_session()
    ids, mask = padded(ROWS, side)
    first = llm.generate(ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=6, **{name: session})
    whole = grown(first)
    mask = torch.cat((mask, torch.ones(4, 11, dtype=torch.bool)), 1)
    fork = session.fork()
    got = llm.generate(whole, attention_mask=mask.long(), **GREEDY, **{name: session})
    for index in range(4):
        row = whole[index][mask[index]][None]
        assert torch.equal(got[index, whole.shape[1] :], model().generate(row, **GREEDY)[0, row.shape[1] :])
    new = slice(fork.get_seq_length(), None)
    alone = llm.generate(whole[:, new], attention_mask=mask.long(), **GREEDY, **{name: fork})
    assert torch.equal(alone, got[:, new]), "only what is new, with the mask of all"


@pytest.mark.parametrize("budgets", [Budgets.full(2, FULL), Budgets((12, 17))], ids=["full", "tight"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_feeds_the_session_that_it_is_given(name: str, budgets: Budgets) -> None:
    llm = transformed(budgets)
    session = llm.new_session()
    output = llm(random_ids(1, 9), **{name: session})
    assert output[CACHE_NAME] is session
    assert session.tokens_seen.tolist() == [9]
    llm(random_ids(1, 3), **{name: session})
    assert session.tokens_seen.tolist() == [12]


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_two_names(call: str) -> None:
    """For the same session, for one and None, and for two sessions, of which transformers would drop one."""
    llm = full()
    first, second = llm.new_session(), llm.new_session()
    feed = (lambda **caches: llm.generate(random_ids(1, 9), **GREEDY, **caches)) if call == "generate" else (
        lambda **caches: llm(random_ids(1, 9), **caches)
    )  # fmt: skip
    with pytest.raises(SessionError, match="past_key_values and cache are two names for one argument"):
        feed(past_key_values=first, cache=second)
    with pytest.raises(SessionError, match="got different caches"):
        feed(past_key_values=DynamicCache(), cache=second)
    assert first.tokens_seen.tolist() == second.tokens_seen.tolist() == [0]
    feed(past_key_values=first, cache=first)
    feed(past_key_values=None, cache=second)
    assert first.tokens_seen.tolist() == second.tokens_seen.tolist() != [0]


def test_other_names_are_refused_or_used() -> None:
    """What transformers called the cache of some models, and names that none has."""
    llm = full()
    session = llm.new_session()
    assert torch.equal(
        llm.generate(random_ids(1, 9), **GREEDY, cache_params=session), model().generate(random_ids(1, 9), **GREEDY)
    )
    assert session.tokens_seen.tolist() == [9 + 11]
    with pytest.raises(PromptError, match="unknown arguments: cache_params"):
        llm(random_ids(1, 9), cache_params=session)
    for name in ("state", "mems", "past_buckets_states", "past", "session"):
        with pytest.raises(ValueError, match=name):
            llm.generate(random_ids(1, 9), **GREEDY, **{name: session})


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("name", NAMES)
def test_turns_are_fed_in_chunks_where_transformers_can(name: str, chunk: int) -> None:
    """Older versions would feed the chunks of the whole conversation."""
    llm = full()
    session = llm.new_session()
    conversation = grown(llm.generate(random_ids(1, 9), **GREEDY, **{name: session}))
    options = {**GREEDY, "prefill_chunk_size": chunk, name: session}
    if CHUNKS_HOLD_NEW_TOKENS:
        expected = model().generate(conversation, **GREEDY)
        assert torch.equal(llm.generate(conversation, **options), expected)
        assert session.tokens_seen.tolist() == [9 + 12 + 5 + 11]
    else:
        with pytest.raises(SessionError, match="from its start again when prefill_chunk_size is given"):
            llm.generate(conversation, **options)
        assert session.tokens_seen.tolist() == [9 + 11]


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("length", [1, 19, 20])
def test_a_conversation_without_anything_new_is_refused(length: int, chunk: int | None) -> None:
    """In chunks, transformers would feed all that the session holds again."""
    llm = full()
    session = llm.new_session()
    conversation = llm.generate(random_ids(1, 9), **GREEDY, past_key_values=session)
    with pytest.raises(PromptError, match=f"holds 20 tokens a row, and the conversation given has {length}: nothing"):
        llm.generate(conversation[:, :length], **GREEDY, past_key_values=session, prefill_chunk_size=chunk)
    assert session.tokens_seen.tolist() == [20]


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_tokens_that_were_fed_before_are_not_fed_again(masked: bool) -> None:
    """Whatever a version of transformers hands over: here, a whole conversation as if all of it were new."""
    llm = full()
    session = llm.new_session()
    llm(random_ids(1, 20), past_key_values=session)
    mask = torch.ones(1, 24, dtype=torch.int64) if masked else None
    given: dict[str, Any] = {CACHE_NAME: session, "attention_mask": mask, "prompt_columns": 24}
    with pytest.raises(SessionError, match="feed 24 tokens a row to a session that holds 20 of the conversation's 24"):
        llm.prepare_inputs_for_generation(random_ids(1, 24), is_first_iteration=True, **given)
    for new in (random_ids(1, 24), random_ids(1, 4)):
        sliced = 4 if new.shape[1] == 24 else None
        inputs = llm.prepare_inputs_for_generation(new, sliced, is_first_iteration=True, **given)
        assert torch.equal(inputs["input_ids"], new[:, -4:])


def test_a_version_that_does_not_slice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 5.24 does for caches of linear attention; other versions slice for any cache."""
    llm = full()
    session = llm.new_session()
    conversation = grown(llm.generate(random_ids(1, 9), **GREEDY, past_key_values=session))
    monkeypatch.setattr(SessionCache, "is_linear", [True])
    if CACHE_NAME == "past_key_values":
        assert torch.equal(
            llm.generate(conversation, **GREEDY, past_key_values=session), model().generate(conversation, **GREEDY)
        )
    else:
        with pytest.raises(SessionError, match="feed 26 tokens a row to a session that holds 20"):
            llm.generate(conversation, **GREEDY, past_key_values=session)
        assert session.tokens_seen.tolist() == [20]


def test_the_name_is_that_of_the_installed_version() -> None:
    output = model().generate(random_ids(1, 5), **GREEDY, return_dict_in_generate=True)
    assert CACHE_NAME in output
    assert CACHE_NAME in CACHE_NAMES


def test_the_cache_of_a_call() -> None:
    one = DynamicCache()
    assert cache_given({}) is cache_given({"cache": None, "past_key_values": None}) is None
    for name in CACHE_NAMES:
        assert cache_given({name: one, "input_ids": 3}) is one
    assert cache_given({"cache": one, "past_key_values": one}) is one
    with pytest.raises(SessionError, match="past_key_values and cache_params are two names"):
        cache_given({"cache_params": DynamicCache(), "past_key_values": one})
