"""How long a sequence may be: as long as the model's tables of positions, where it has any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MptConfig,
    MptForCausalLM,
)

import xkv_fx
from xkv_fx import Budgets, PromptError

TRAINED_ON, PROMPT, NEW = 32, 40, 4
TOKENS: dict[str, Any] = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def bloom() -> Any:
    return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, seq_length=TRAINED_ON, **TOKENS))


def falcon() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
    return FalconForCausalLM(FalconConfig(max_position_embeddings=TRAINED_ON, **sizes, **TOKENS))


def mpt() -> Any:
    return MptForCausalLM(MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=TRAINED_ON, **TOKENS))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=TRAINED_ON, **TOKENS))


def prompt() -> dict[str, Any]:
    ids = torch.randint(3, 61, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}


@pytest.mark.parametrize("make", [bloom, falcon])
def test_slopes_have_no_end(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    llm = xkv_fx.transform(model, Budgets.full(2, PROMPT + NEW), backend="eager")
    assert torch.equal(llm.generate(**prompt()), model.generate(**prompt()))


@pytest.mark.parametrize("make", [mpt, gpt2])
def test_tables_have_one(make: Callable[[], Any]) -> None:
    model = make().eval()
    llm = xkv_fx.transform(model, Budgets.full(2, PROMPT + NEW), backend="eager")
    with pytest.raises((RuntimeError, IndexError)):
        model.generate(**prompt())
    with pytest.raises(PromptError, match=rf"40 tokens are more than the model's ({TRAINED_ON}|{TRAINED_ON - 1}) pos"):
        llm.generate(**prompt())
