"""What Python and transformers may do with any cache: each of it works on a session, or is refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ready_models import full, model, transformed
from tiny_models import llama, random_ids
from torch import Tensor
from transformers.cache_utils import Cache

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.errors import PromptError, SessionError
from xkv_fx.hf.cache import SessionCache
from xkv_fx.runtime.session import Session

ROWS, FED = 2, 9


def fed() -> SessionCache:
    session = full(rows=ROWS).new_session()
    full(rows=ROWS)(random_ids(ROWS, FED), past_key_values=session)
    return session


def following(session: SessionCache, tokens: Tensor | None = None) -> Tensor:
    """The logits of three more tokens."""
    output = full(rows=ROWS)(random_ids(ROWS, 3, seed=5) if tokens is None else tokens, past_key_values=session)
    logits: Tensor = output.logits
    return logits


# What transformers' Cache has

NUMBERS: dict[str, Callable[[SessionCache], tuple[Any, Any]]] = {
    "batch_size": lambda session: (session.batch_size, ROWS),
    "max_batch_size": lambda session: (session.max_batch_size, ROWS),
    "get_seq_length": lambda session: (session.get_seq_length(1), FED),
    "get_query_offset": lambda session: (session.get_query_offset(1), FED),
    "get_max_length": lambda session: (session.get_max_length(), session.get_max_length(0)),
    "get_max_cache_shape": lambda session: (session.get_max_cache_shape(), 72),
    "max_cache_len": lambda session: (session.max_cache_len, 72),
    "is_compileable": lambda session: (session.is_compileable, False),
    "is_croppable": lambda session: (session.is_croppable, False),
    "is_initialized": lambda session: (session.is_initialized, True),
    "is_sliding": lambda session: (session.is_sliding, [False, False]),
    "is_linear": lambda session: (session.is_linear, [False, False]),
    "is_dummy": lambda session: (session.is_dummy, [False, False]),
    "is_recording_past": lambda session: (session.is_recording_past(0), False),
}
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "crop": ((-1,), "cannot be cropped"),
    "activate_past_recording": ((), "evicted tokens are gone"),
    "batch_repeat_interleave": ((2,), "transform with batch_size=4"),
    "early_initialization": ((2, 2, 8, torch.float32, "cpu"), "allocated from the start"),
    "offload": ((0,), "stays on its model's device"),
    "prefetch": ((0,), "stays on its model's device"),
    "has_previous_state": (
        (),
        "a session hands out no recurrent or convolution state; what its layers keep is in session.session.state",
    ),
    "get_conv_state": ((0,), "hands out no recurrent or convolution state"),
    "update_conv_state": ((torch.zeros(1), 0), "hands out no recurrent or convolution state"),
    "get_recurrent_state": ((0,), "hands out no recurrent or convolution state"),
    "update_recurrent_state": ((torch.zeros(1), 0), "hands out no recurrent or convolution state"),
    "update_indexer": ((torch.zeros(1), 0), "hands out no indexer"),
    "get_mask_sizes": ((3, 0), "belongs to a transformed model"),
    "update": ((torch.zeros(1), torch.zeros(1), 0), "belongs to a transformed model"),
}
WORKS = {"reset", "reorder_cache", "batch_select_indices"}
"""Tested below."""


@pytest.mark.parametrize("kind", [SessionCache, xkv_fx.Cache])
def test_every_public_name_of_transformers_cache_was_decided_about(kind: type[Cache]) -> None:
    """A new one of a new version would do nothing without a word, or raise what nobody understands."""
    public = {name for name in dir(Cache) if not name.startswith("_")}
    assert public <= {*NUMBERS, *REFUSED, *WORKS}
    inherited = {name for name in (*public, "__len__", "__repr__") if getattr(kind, name) is getattr(Cache, name)}
    assert not inherited


def test_numbers() -> None:
    session = fed()
    for name, ask in NUMBERS.items():
        got, expected = ask(session)
        assert got == expected, name
    assert len(session) == 2
    assert repr(session) == f"SessionCache(layers=2, fed=9, kv_bytes={session.kv_bytes})"
    assert session.offloading is False
    assert session.layer_class_to_replicate is None
    assert transformed(Budgets((12, 17))).new_session().get_max_length() == -1


def test_what_is_refused_is_refused_by_name() -> None:
    session = fed()
    for name, (arguments, message) in REFUSED.items():
        with pytest.raises(SessionError, match=message):
            getattr(session, name)(*arguments)
    with pytest.raises(SessionError, match="no layers of transformers' kind"):
        session.layers  # noqa: B018
    assert torch.equal(following(session), following(fed()))


@pytest.mark.parametrize("name", ["batch_select_indices", "reorder_cache"])
def test_rows_are_chosen(name: str) -> None:
    session = fed()
    getattr(session, name)(torch.tensor([1, 1]))
    chosen = random_ids(ROWS, FED)[[1, 1]]
    with torch.no_grad():
        expected = model()(torch.cat((chosen, random_ids(ROWS, 3, seed=5)), 1)).logits[:, FED:]
    torch.testing.assert_close(following(session), expected, atol=1e-4, rtol=0)
    for wrong in ([1], [0, 1, 1], [0, 2]):
        with pytest.raises(PromptError, match=r"rows? "):
            getattr(session, name)(torch.tensor(wrong))
    with pytest.raises(PromptError, match="rows"):
        session.batch_select_indices(torch.tensor([True, False]))
    session.batch_select_indices(torch.tensor([-1, 0]))
    session.reset()
    assert session.fed == 0


# Copies

COPIES: dict[str, Callable[[Any], Any]] = {"copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_a_fork(way: str) -> None:
    """As transformers' documentation keeps a prefix for several prompts."""
    llm, prefix = full(), random_ids(1, 9)
    kept = llm.new_session()
    llm(prefix, past_key_values=kept)
    for seed in (1, 2):
        prompt = torch.cat((prefix, random_ids(1, 4, seed)), 1)
        session = COPIES[way](kept)
        got = llm.generate(prompt, past_key_values=session, do_sample=False, max_new_tokens=4)
        assert torch.equal(got, model().generate(prompt, do_sample=False, max_new_tokens=4))
        assert (session.fed, kept.fed) == (16, 9)
    pair = copy.deepcopy([kept, kept])
    assert pair[0] is pair[1] is not kept


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_runtime_sessions(way: str) -> None:
    """As engines and plain modules have them."""
    session = fed().session
    twin = COPIES[way](session)
    assert type(twin) is Session
    before = [tensor.clone() for tensor in session.state.tensors]
    twin.step(torch.ones(ROWS, 1, dtype=torch.int64))
    assert all(map(torch.equal, before, session.state.tensors))
    assert (session.seen, twin.seen) == ((9, 9), (10, 10))
    assert session.transcript.ids.shape == (ROWS, 9)


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_the_cache_of_a_compiled_model(way: str) -> None:
    """It is found by its own tensors."""
    source = llama(2)
    cache = xkv_fx.Cache(source, Budgets((12, 6)))
    twin = COPIES[way](cache)
    assert type(twin) is xkv_fx.Cache
    assert twin.handle.data_ptr() != cache.handle.data_ptr()
    assert twin.budgets == cache.budgets
    assert len(twin) == 2


def test_pickling_is_refused() -> None:
    session = fed()
    for kept in (session, session.session, xkv_fx.Cache(llama(2), Budgets((12, 6)))):
        with pytest.raises(SessionError, match=r"cannot be pickled.* in a file by its save\(path\)"):
            pickle.dumps(kept)


# Ambient modes


@pytest.mark.parametrize("eviction", ["ring", "scored", "append"])
def test_a_session_begun_in_inference_mode_goes_on_outside_of_it(eviction: Any) -> None:
    llm = transformed(Budgets((12, 17), Policy(eviction=eviction)), max_new_tokens=9)
    ids, turn = random_ids(1, 20), random_ids(1, 3, seed=1)

    def logits(outside: bool) -> list[Tensor]:
        with torch.inference_mode(not outside):
            session = llm.new_session()
            llm(ids, past_key_values=session)
            session.step(turn[:, :1], None)
            fork = session.fork()
        return [
            step
            for kept in (session, fork)
            for step in (kept.feed(turn, None, None, True), kept.step(turn[:, :1], None))
        ]

    for inside, outside in zip(logits(False), logits(True), strict=True):
        assert torch.equal(inside, outside)
    session = llm.new_session()
    with torch.inference_mode():
        session.feed(ids, None, None, False)
    session.reset()
    assert session.fed == 0
