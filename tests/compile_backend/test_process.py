"""What one process compiled before must not decide what a call gets, or is told."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny_models import VOCABULARY, llama, random_ids

import xkv_fx
from xkv_fx import Budgets

ROWS = VOCABULARY // 17 + 1  # more probe tokens than there are ids


def compiled(budgets: Budgets) -> Any:
    model: Any = copy.deepcopy(llama(2))
    model.set_attn_implementation("xkv")
    model.compile(backend="xkv", options={"budgets": budgets, "lower": "eager"})
    return model


def test_more_rows_than_a_small_vocabulary_has_ids_for() -> None:
    torch._dynamo.reset()
    model, budgets, ids = compiled(Budgets.full(2, 64)), Budgets.full(2, 64), random_ids(ROWS, 12)
    cache = xkv_fx.Cache(model, budgets, batch_size=ROWS)
    tokens = model.generate(ids, max_new_tokens=3, do_sample=False, past_key_values=cache)
    assert torch.equal(tokens, llama(2).generate(ids, max_new_tokens=3, do_sample=False))
