"""What one process compiled before must not decide what a call gets, or is told."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, llama, random_ids

import xkv_fx
from xkv_fx import BackendError, Budgets, SessionError
from xkv_fx.hf.recompile_limit import HAS_ISOLATION

ROWS = VOCABULARY // 17 + 1  # more probe tokens than there are ids


BUDGETS = Budgets.full(2, 64)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(budgets: Budgets, source: Any = None, **options: Any) -> Any:
    model: Any = copy.deepcopy(llama(2) if source is None else source)
    model.set_attn_implementation("xkv")
    model.compile(backend="xkv", options={"budgets": budgets, "lower": "eager"}, **options)
    return model


def generate(model: Any, budgets: Budgets) -> Any:
    cache = xkv_fx.Cache(model, budgets)
    return model.generate(random_ids(1, 12), max_new_tokens=3, do_sample=False, past_key_values=cache)


def test_more_rows_than_a_small_vocabulary_has_ids_for() -> None:
    model, ids = compiled(BUDGETS), random_ids(ROWS, 12)
    cache = xkv_fx.Cache(model, BUDGETS, batch_size=ROWS)
    tokens = model.generate(ids, max_new_tokens=3, do_sample=False, past_key_values=cache)
    assert torch.equal(tokens, llama(2).generate(ids, max_new_tokens=3, do_sample=False))


def test_models_whose_scales_differ() -> None:
    """Dynamo makes a number an input once it has seen it change; each model still gets its own."""
    for size in (32, 64, 32):
        source = llama(2, hidden_size=size)
        expected = source.generate(random_ids(1, 12), max_new_tokens=3, do_sample=False)
        assert torch.equal(generate(compiled(BUDGETS, source), BUDGETS), expected)


def test_calls_that_keep_different_logits() -> None:
    """One that is refused does not decide what the next one gets."""
    source, ids = llama(2), random_ids(1, 12)
    model, positions = compiled(BUDGETS, source), torch.arange(12)[None]
    expected = source(ids).logits

    def call(keep: int) -> torch.Tensor:
        cache = xkv_fx.Cache(model, BUDGETS)
        logits: torch.Tensor = model(ids, position_ids=positions, past_key_values=cache, logits_to_keep=keep).logits
        return logits

    with torch.no_grad():
        for keep in (3, 1, 2, 0):
            if keep > 1:
                with pytest.raises(BackendError, match=f"the logits of {keep} tokens; logits_to_keep must be 0"):
                    call(keep)
            else:
                torch.testing.assert_close(call(keep), expected[:, -keep:], rtol=0, atol=1e-4)


@pytest.mark.skipif(not HAS_ISOLATION, reason="this torch counts the compilations of all models together")
def test_more_plans_than_dynamo_compiles_together() -> None:
    """With the limit at three: each plan takes two."""
    plans = [Budgets((24,) * 2), Budgets((25,) * 2)]
    with torch._dynamo.config.patch(recompile_limit=3):
        for plan in plans:
            generate(compiled(plan, isolate_recompiles=True), plan)
        torch._dynamo.reset()
        generate(compiled(plans[0]), plans[0])
        with pytest.raises(SessionError, match=r"Dynamo has given up on it.*isolate_recompiles=True"):
            generate(compiled(plans[1]), plans[1])
