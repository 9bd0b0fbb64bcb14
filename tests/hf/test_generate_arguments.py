"""Every argument that transformers' `generate` hands on to a model: the same tokens, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import ready_models
import torch
import transformers
from tiny_models import VOCABULARY, llama, random_ids
from tokenizers import Tokenizer, models, pre_tokenizers

import xkv_fx
from xkv_fx import BackendError, Budgets, PromptError, SessionError

IDS = random_ids(1, 10)
NEW = 6


class Streamer(transformers.generation.streamers.BaseStreamer):
    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    model = copy.deepcopy(llama(2))
    return model, xkv_fx.transform(model, Budgets.full(2, 64), backend="eager")


def generate(model: Any, options: dict[str, Any]) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(IDS, max_new_tokens=NEW, do_sample=False, **options)
    return tokens


ALIKE: dict[str, dict[str, Any]] = {
    "tokenizer": {"tokenizer": object()},
    "assistant_tokenizer": {"assistant_tokenizer": object()},
    "streamer": {"streamer": Streamer()},
    "synced_gpus": {"synced_gpus": False},
    "logits_processor": {"logits_processor": [transformers.NoRepeatNGramLogitsProcessor(2)]},
    "stopping_criteria": {"stopping_criteria": [transformers.MaxLengthCriteria(13)]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch, ids: [4, 5, 6]},
    "guidance_scale": {"guidance_scale": 1.5},
    "negative_prompt_ids": {"guidance_scale": 1.5, "negative_prompt_ids": random_ids(1, 4, seed=3)},
    "custom_generate": {"custom_generate": lambda model, input_ids, **more: input_ids},
    "prefill_chunk_size": {"prefill_chunk_size": 4},
    "logits_to_keep": {"logits_to_keep": 1},
}


@pytest.mark.parametrize("name", list(ALIKE))
def test_the_tokens_are_those_of_transformers(name: str, pair: tuple[Any, Any]) -> None:
    model, llm = pair
    assert torch.equal(generate(llm, ALIKE[name]), generate(model, ALIKE[name]))


def test_strings_end_a_generation(pair: tuple[Any, Any]) -> None:
    model, llm = pair
    words = {"abcdef": 0, **{f"w{token}": token for token in range(1, VOCABULARY)}}  # the first is transformers' probe
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    second = tokenizer.decode(generate(model, {})[0, 11:12])
    options = {"stop_strings": [second], "tokenizer": tokenizer}
    assert generate(model, options).shape[1] < 10 + NEW
    assert torch.equal(generate(llm, options), generate(model, options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"assistant_model": "model"}, r"leave assistant_model out"),
        ({"prompt_lookup_num_tokens": 3}, r"leave prompt_lookup_num_tokens out"),
        ({"assistant_early_exit": 1}, r"leave assistant_early_exit out"),
        ({"use_mtp": True}, r"leave use_mtp out"),
        ({"generation_config": transformers.GenerationConfig(prompt_lookup_num_tokens=2)}, r"leave prompt_lookup_num"),
        ({"cache_implementation": "static"}, r"leave it out, or set it to None in the generation_config"),
        ({"output_attentions": True}, r"output_attentions is not supported"),
        ({"is_causal": False}, r"unknown arguments: is_causal"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str, pair: tuple[Any, Any]) -> None:
    with pytest.raises((PromptError, SessionError), match=said):
        generate(pair[1], options)


def test_a_transformed_model_is_no_assistant(pair: tuple[Any, Any]) -> None:
    with pytest.raises(SessionError, match=r"cannot be the assistant_model.*give the model that it was made from"):
        generate(pair[0], {"assistant_model": pair[1]})


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused(name: str, pair: tuple[Any, Any]) -> None:
    with pytest.raises(BackendError, match=r"generate_many\(\) keeps the rows of this model busy"):
        getattr(pair[1], name)([[3, 4]])


def test_a_checkpoint_that_names_a_kind_of_cache_is_taken() -> None:
    model: Any = copy.deepcopy(llama(2))
    expected = generate(model, {})
    model.generation_config.cache_implementation = "static"
    llm = xkv_fx.transform(model, Budgets.full(2, 64), backend="eager")
    assert torch.equal(generate(llm, {}), expected)
    assert model.generation_config.cache_implementation == "static"


@pytest.mark.parametrize("token", [-1, 61, 10**9])
def test_a_token_that_the_model_does_not_have_is_refused_before_anything_is_fed(token: int) -> None:
    llm = ready_models.transformed(Budgets((8, 8)))
    ids = random_ids(1, 6)
    wrong = ids.clone()
    wrong[0, 3] = token
    session = llm.new_session()
    for call in (
        lambda: llm.generate(wrong, attention_mask=torch.ones_like(wrong), past_key_values=session, max_new_tokens=2),
        lambda: llm(wrong, past_key_values=session),
        lambda: session.feed(wrong, None, None, False),
        lambda: session.step(wrong[:, 3:4], None),
    ):
        with pytest.raises(PromptError, match=f"the input has the token {token}, but the model's tokens are 0 to 60"):
            call()
    assert session.fed == 0
    session.feed(ids, None, None, False)
    with pytest.raises(PromptError, match=f"the token {token}, but the model's"):
        llm.decode_steps(2, session, wrong[:, 3:4])
    assert session.fed == 6
