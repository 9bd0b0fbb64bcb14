"""Under `torch.autocast` every way in refuses by name, at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_models import decoder, example, sdpa
from tiny_models import llama, random_ids

import xkv_fx
from xkv_fx import BackendError, Budgets

FULL = Budgets.full(2, 64)
IDS = random_ids(1, 12)


def refused(call: Callable[[], Any]) -> None:
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(BackendError, match=r"autocast is on for cpu"),
    ):
        call()


def test_models_are_not_read_under_autocast() -> None:
    model = copy.deepcopy(llama(2))
    refused(lambda: xkv_fx.transform(model, FULL, backend="eager"))
    refused(lambda: xkv_fx.profile(model, [IDS]))
    refused(lambda: xkv_fx.Cache(model, FULL))
    refused(lambda: xkv_fx.transform(decoder(sdpa), FULL, backend="eager", example_inputs=example()))


def test_tokens_are_not_fed_under_autocast() -> None:
    llm = xkv_fx.transform(copy.deepcopy(llama(2)), FULL, backend="eager")
    session = llm(IDS, past_key_values=llm.new_session()).past_key_values
    refused(lambda: llm.generate(IDS, max_new_tokens=2))
    refused(lambda: llm(IDS, past_key_values=session))
    refused(lambda: llm.decode_steps(2, session, IDS[:, :1]))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert llm.generate(IDS, max_new_tokens=2).shape == (1, 14)


def test_the_backend_refuses_it() -> None:
    model = copy.deepcopy(llama(2))
    model.set_attn_implementation("xkv")
    model.compile(backend="xkv", options={"budgets": FULL, "lower": "eager"})
    cache = xkv_fx.Cache(model, FULL)
    refused(lambda: model.generate(IDS, max_new_tokens=2, past_key_values=cache))
    assert model.generate(IDS, max_new_tokens=2, past_key_values=cache).shape == (1, 14)
