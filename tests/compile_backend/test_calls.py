"""How a compiled model may be called, in any supported version of transformers: names of the cache, decorators around
`forward`, functions around the model. A cache that is given is used, or an error says why not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import llama, random_ids
from transformers import DynamicCache, PreTrainedModel

import xkv_fx
from xkv_fx import Budgets
from xkv_fx.errors import PromptError, SessionError
from xkv_fx.hf.cache_name import CACHE_NAME, CACHE_NAMES

BUDGETS = Budgets((6,))
OPTIONS: dict[str, Any] = {"budgets": BUDGETS, "lower": "eager"}
IDS = random_ids(1, 9)
PROMPT: dict[str, Any] = {"input_ids": IDS, "position_ids": torch.arange(9)[None]}
TOKEN: dict[str, Any] = {"input_ids": IDS[:, :1], "position_ids": torch.tensor([[9]])}
TAKEN = [name for name in CACHE_NAMES if name == CACHE_NAME or (name == "past_key_values" and CACHE_NAME == "cache")]
"""By forward; older versions know the old name alone."""


@pytest.fixture(autouse=True)
def _compiles_of_this_test_alone() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: PreTrainedModel | None = None) -> PreTrainedModel:
    model = model or llama(1)
    model.set_attn_implementation("xkv")
    model.compile(backend="xkv", options=OPTIONS)
    return model


@pytest.mark.parametrize("name", TAKEN)
def test_a_cache_under_any_name_that_forward_has(name: str) -> None:
    model = compiled()
    caches = [xkv_fx.Cache(model, BUDGETS) for _ in range(2)]
    for cache in caches:
        model(**PROMPT, **{name: cache})
    model(**TOKEN, **{name: caches[0]})
    assert [cache.tokens_seen.item() for cache in caches] == [10, 9]
    with pytest.raises(SessionError, match=f"a DynamicCache has no bounded memory.*{name}=xkv_fx.Cache"):
        model(**PROMPT, **{name: DynamicCache()})


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", sorted(set(CACHE_NAMES) - set(TAKEN)))
def test_a_cache_under_another_name_is_not_ignored(name: str, use_cache: bool) -> None:
    model = compiled()
    cache = xkv_fx.Cache(model, BUDGETS)
    model(**PROMPT, use_cache=False)  # what the call would be without it
    with pytest.raises(SessionError, match=f"does not use .* given as {name}; .* calls this argument {CACHE_NAME}"):
        model(**PROMPT, use_cache=use_cache, **{name: cache})
    assert cache.tokens_seen.tolist() == [0]


@pytest.mark.parametrize("same", [True, False])
def test_two_names_are_refused(same: bool) -> None:
    """Also when a call with None under one of them was compiled before."""
    model = compiled()
    first, second = (xkv_fx.Cache(model, BUDGETS) for _ in range(2))
    other = next(name for name in ("past_key_values", "cache") if name != CACHE_NAME)
    model(**PROMPT, **{CACHE_NAME: first, other: None})
    # transformers 5.24 drops the old name before any of ours is called; what is left is fed the same tokens again.
    refused = "past_key_values and cache are two names for one argument; pass one"
    refused = refused if CACHE_NAME == "past_key_values" else "position_ids do not go on"
    with pytest.raises((SessionError, PromptError), match=refused):
        model(**PROMPT, **{CACHE_NAME: first, other: first if same else second})
    assert [cache.tokens_seen.item() for cache in (first, second)] == [9, 0]


def test_a_cache_without_a_name() -> None:
    model = compiled()
    with pytest.raises(SessionError, match=f"a DynamicCache .* {CACHE_NAME}=xkv_fx.Cache"):
        model(IDS, None, PROMPT["position_ids"], DynamicCache())


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As newer versions of transformers do: a wrapper whose frame has no `self`."""

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapper


def test_the_model_is_found_behind_a_decorator() -> None:
    """Without it there would be no session of the backend's own, and nobody to compare a cache's model with."""
    model = llama(1)
    model.__class__ = type("Decorated", (type(model),), {"forward": decorated(type(model).forward)})
    compiled(model)
    model(**PROMPT, use_cache=False)
    model(**TOKEN, use_cache=False)
    assert xkv_fx.compiled_session(model).tokens_seen.tolist() == [10]
    with pytest.raises(SessionError, match="made for another model"):
        model(**PROMPT, **{CACHE_NAME: xkv_fx.Cache(llama(1), BUDGETS)})
    with pytest.raises(SessionError, match=f"a DynamicCache .* {CACHE_NAME}=xkv_fx.Cache"):
        model(IDS, None, PROMPT["position_ids"], DynamicCache())


@pytest.mark.parametrize("first", ["its own", "another's"])
def test_caches_of_other_models_in_a_compiled_function(first: str) -> None:
    """There the model of a call is not known; a cache's model is known by its weights."""
    model, other = llama(1), llama(1, seed=3)
    model.set_attn_implementation("xkv")

    @torch.compile(backend="xkv", options=OPTIONS)
    def logits(input_ids: Any, position_ids: Any, held: xkv_fx.Cache) -> Any:
        return model(input_ids, position_ids=position_ids, **{CACHE_NAME: held}).logits

    own, foreign = xkv_fx.Cache(model, BUDGETS), xkv_fx.Cache(other, BUDGETS)
    if first == "its own":
        logits(*PROMPT.values(), own)
    with pytest.raises(SessionError, match="made for another model"):
        logits(*PROMPT.values(), foreign)
    own.reset()
    logits(*PROMPT.values(), own)
    assert [cache.tokens_seen.item() for cache in (own, foreign)] == [9, 0]
