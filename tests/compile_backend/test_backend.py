"""The backend "xkv" of `torch.compile`: the tokens of `transform` and of the plain model, in bounded memory, compiled
once for several tokens and once for one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from exhaustive import exhaustive
from graph_checks import assert_meta_is_true
from tiny_models import gemma3, llama, random_ids
from torch import Tensor
from transformers import PreTrainedModel

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.errors import CapacityError, PromptError, SessionError
from xkv_fx.evaluation.speed.live_bytes import memory_changes
from xkv_fx.hf.generation import BudgetedLM

BUDGETS = Budgets((12, 6))
"""Compiling is most of what these tests cost."""
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}


def compiled(model: PreTrainedModel, budgets: Budgets, **options: Any) -> PreTrainedModel:
    model.set_attn_implementation("xkv")
    model.compile(backend="xkv", options={"budgets": budgets, "lower": "eager", **options})
    return model


@pytest.fixture(scope="module", autouse=True)
def _compiles_of_this_file_alone() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return compiled(llama(), BUDGETS)


@pytest.fixture(scope="module")
def llm() -> BudgetedLM:
    return xkv_fx.transform(llama(), BUDGETS, backend="eager", check=False)


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_the_backend_is_listed() -> None:
    assert "xkv" in torch._dynamo.list_backends()


def test_tokens_are_those_of_transform_and_two_graphs_are_compiled(model: PreTrainedModel, llm: BudgetedLM) -> None:
    """For prompts shorter and longer than what is kept, whatever the number of tokens."""
    before = compilations()
    for length in (30, 5, 17):
        ids = random_ids(1, length, seed=length)
        cache = xkv_fx.Cache(model, BUDGETS)
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), llm.generate(ids, **GREEDY))
        assert cache.kv_bytes == BUDGETS.kv_bytes(llm)
        assert cache.tokens_seen.tolist() == [length + 19]
    assert compilations() - before == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_nothing_is_compiled_again(model: PreTrainedModel) -> None:
    cache = xkv_fx.Cache(model, BUDGETS)
    model.generate(random_ids(1, 9), past_key_values=cache, **GREEDY)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (2, 40, 63):
            model.generate(random_ids(1, length), past_key_values=xkv_fx.Cache(model, BUDGETS), **GREEDY)
        cache.reset()
        model.generate(random_ids(1, 11), past_key_values=cache, **{**GREEDY, "max_new_tokens": 33})


def test_two_caches_take_turns(model: PreTrainedModel, llm: BudgetedLM) -> None:
    prompts = [random_ids(1, length, seed=length) for length in (23, 31)]
    caches = [xkv_fx.Cache(model, BUDGETS) for _ in prompts]
    texts = prompts
    for _ in range(3):
        texts = [
            model.generate(
                text, attention_mask=torch.ones_like(text), past_key_values=cache, do_sample=False, max_new_tokens=1
            )
            for text, cache in zip(texts, caches, strict=True)
        ]
    for prompt, text in zip(prompts, texts, strict=True):
        assert torch.equal(text, llm.generate(prompt, do_sample=False, max_new_tokens=3))


def test_a_conversation_goes_on(model: PreTrainedModel, llm: BudgetedLM) -> None:
    """With the whole of it each time, as transformers' caches; a fork goes its own way."""
    cache, session = xkv_fx.Cache(model, BUDGETS), llm.new_session()
    text = random_ids(1, 20)
    for turn in range(2):
        answers = [
            lm.generate(
                text, attention_mask=torch.ones_like(text), past_key_values=kept, do_sample=False, max_new_tokens=6
            )
            for lm, kept in ((model, cache), (llm, session))
        ]
        assert torch.equal(*answers)
        text = torch.cat((answers[0], random_ids(1, 7, seed=turn)), 1)
    fork = cache.fork()
    mask = torch.ones_like(text)
    answers = [model.generate(text, attention_mask=mask, past_key_values=kept, **GREEDY) for kept in (cache, fork)]
    assert torch.equal(*answers)


def test_a_prompt_of_one_token_is_prefilled(model: PreTrainedModel, llm: BudgetedLM) -> None:
    ids = random_ids(1, 1)
    cache = xkv_fx.Cache(model, BUDGETS)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), llm.generate(ids, **GREEDY))


@pytest.mark.parametrize("rows", [2, pytest.param(3, marks=exhaustive)])
def test_padded_rows_are_what_each_is_alone(model: PreTrainedModel, llm: BudgetedLM, rows: int) -> None:
    """Rows that follow others through the same compiled call too: Dynamo leaves their number open once it changed."""
    alone = [random_ids(1, length, seed=length) for length in (30, 12, 21)[:rows]]
    ids, mask = padded(alone)
    cache = xkv_fx.Cache(model, BUDGETS, batch_size=rows)
    got = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    for row, prompt in zip(got, alone, strict=True):
        assert row[30:].tolist() == llm.generate(prompt, **GREEDY)[0, prompt.shape[1] :].tolist()


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of a batch, padded on the left."""
    longest = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, longest - row.shape[1] :] = row[0]
        mask[index, longest - row.shape[1] :] = 1
    return ids, mask


@exhaustive
def test_beams_follow_their_rows(model: PreTrainedModel, llm: BudgetedLM) -> None:
    options: dict[str, Any] = {**GREEDY, "num_beams": 2, "max_new_tokens": 8}
    two = xkv_fx.transform(llama(), BUDGETS, batch_size=2, backend="eager", check=False)
    ids = random_ids(1, 25)
    cache = xkv_fx.Cache(model, BUDGETS, batch_size=2)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), two.generate(ids, **options))


def test_weights_are_those_of_the_call(model: PreTrainedModel) -> None:
    """Dynamo hands over the weights that the model has then, also one that was exchanged."""
    ids = random_ids(1, 9)
    head: Any = model.get_output_embeddings()
    before = model.generate(ids, past_key_values=xkv_fx.Cache(model, BUDGETS), **GREEDY)
    kept = head.weight
    head.weight = torch.nn.Parameter(kept.detach().roll(1, dims=0))
    try:
        after = model.generate(ids, past_key_values=xkv_fx.Cache(model, BUDGETS), **GREEDY)
    finally:
        head.weight = kept
    assert after[0, 9] == (before[0, 9] + 1) % 61


def test_caches_of_others(model: PreTrainedModel) -> None:
    """Of another plan or another model, though of the same shapes."""
    ids = random_ids(1, 9)
    with pytest.raises(SessionError, match="made for other budgets"):
        model.generate(ids, past_key_values=xkv_fx.Cache(model, Budgets((12, 7))), **GREEDY)
    with pytest.raises(SessionError, match="made for another model"):
        model.generate(ids, past_key_values=xkv_fx.Cache(llama(), BUDGETS), **GREEDY)


def test_positions_that_skip_tokens(model: PreTrainedModel) -> None:
    with pytest.raises(PromptError, match=r"do not go on from .*\(0\); pass an attention_mask"):
        model.generate(
            random_ids(1, 9),
            position_ids=torch.arange(1, 10)[None],
            past_key_values=xkv_fx.Cache(model, BUDGETS),
            **GREEDY,
        )


def test_what_was_compiled_is_described(model: PreTrainedModel) -> None:
    cache = xkv_fx.Cache(model, BUDGETS)
    assert "nothing compiled yet" in cache.describe()
    model.generate(random_ids(1, 20), past_key_values=cache, **GREEDY)
    text = cache.describe()
    assert "insert_prefill_cache" in text
    assert "insert_decode_cache" in text
    many, one = cache.graphs
    assert (many.many, one.many) == (True, False)
    state = cache.session.program.plan.allocate().tensors
    ids, positions = random_ids(1, 10), torch.arange(10)[None]
    assert_meta_is_true(many.module("prefill"), ids, positions, torch.ones(1, 10, dtype=torch.bool), *state)
    assert_meta_is_true(one.module("decode"), ids[:, :1], positions[:, :1], *state)


def test_a_saved_cache_fits_transform(model: PreTrainedModel, llm: BudgetedLM, tmp_path: Any) -> None:
    cache, session = xkv_fx.Cache(model, BUDGETS), llm.new_session()
    text = model.generate(random_ids(1, 20), past_key_values=cache, **GREEDY)
    cache.save(tmp_path / "cache")
    session.load(tmp_path / "cache")
    text = torch.cat((text, random_ids(1, 5)), 1)
    options = {**GREEDY, "attention_mask": torch.ones_like(text)}
    got, expected = (
        lm.generate(text, past_key_values=kept, **options) for lm, kept in ((model, cache), (llm, session))
    )
    assert torch.equal(got, expected)


def test_bare_calls_run_on_a_session_of_the_backend(llm: BudgetedLM) -> None:
    """Several tokens are a prompt, one is decoded, a reset starts anew; two graphs for it all."""
    torch._dynamo.reset()
    plain = llama()
    plain.set_attn_implementation("xkv")
    call = torch.compile(plain, backend="xkv", options={"budgets": BUDGETS, "lower": "eager"})
    before = compilations()
    for length in (30, 8):
        ids, positions, session = random_ids(1, length, seed=length), torch.arange(length)[None], llm.new_session()
        got = call(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(got, session.feed(ids, None, None, all_logits=True), atol=1e-5, rtol=0)
        for step in range(4):
            token = got[:, -1:].argmax(-1)
            got = call(token, position_ids=torch.tensor([[length + step]]), use_cache=False).logits
            torch.testing.assert_close(got, session.step(token, None), atol=1e-5, rtol=0)
    assert compilations() - before == 2
    session = xkv_fx.compiled_session(call)
    assert session is xkv_fx.compiled_session(plain)
    assert session.kv_bytes == BUDGETS.kv_bytes(llm)
    with pytest.raises(PromptError, match=r"\(12\); several.*compiled_session"):
        call(token, position_ids=torch.tensor([[0]]), use_cache=False)
    session.reset()
    got = call(token, position_ids=torch.tensor([[0]]), use_cache=False).logits
    assert got.shape == (1, 1, 61)
    assert session.tokens_seen.tolist() == [1]
    with pytest.raises(PromptError, match="start anew"):
        call(random_ids(1, 6), position_ids=torch.arange(6)[None] + 1, use_cache=False)


@exhaustive
def test_models_of_one_class_keep_apart_what_they_have_seen(llm: BudgetedLM) -> None:
    """Dynamo runs the graphs of the first for the second too, whose weights and caches are its own."""
    torch._dynamo.reset()
    others = llama(seed=1)
    pair = [
        (compiled(llama(), BUDGETS), llm),
        (compiled(others, BUDGETS), xkv_fx.transform(llama(seed=1), BUDGETS, backend="eager", check=False)),
    ]
    ids, positions = random_ids(1, 20), torch.arange(20)[None]
    before = compilations()
    sessions = [reference.new_session() for _, reference in pair]
    for (plain, _), session in zip(pair, sessions, strict=True):
        got = plain(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(got, session.feed(ids, None, None, all_logits=True), atol=1e-5, rtol=0)
    for (plain, _), session in zip(pair, sessions, strict=True):
        got = plain(ids[:, :1], position_ids=torch.tensor([[20]]), use_cache=False).logits
        torch.testing.assert_close(got, session.step(ids[:, :1], None), atol=1e-5, rtol=0)
    for plain, reference in pair:
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        assert torch.equal(plain.generate(ids, past_key_values=xkv_fx.Cache(plain, BUDGETS), **GREEDY), expected)
    assert compilations() - before == 4  # two without a cache and two with one, each for both models
    with pytest.raises(SessionError, match="made for another model"):
        pair[0][0].generate(ids, past_key_values=xkv_fx.Cache(others, BUDGETS), **GREEDY)


@exhaustive
@pytest.mark.parametrize("eviction", ["none", "scored"])
def test_sliding_windows(eviction: str) -> None:
    """Room for all tokens: those of the plain model. Otherwise those of `transform`."""
    torch._dynamo.reset()
    budgets = Budgets.full(2, 60) if eviction == "none" else Budgets((6, 9), Policy(eviction="scored", sinks=1))
    plain, ids = gemma3(), random_ids(1, 30)
    reference = plain if eviction == "none" else xkv_fx.transform(plain, budgets, backend="eager", check=False)
    expected = reference.generate(ids, **GREEDY)
    model = compiled(gemma3(), budgets)
    assert torch.equal(model.generate(ids, past_key_values=xkv_fx.Cache(model, budgets), **GREEDY), expected)
    if eviction == "none":
        with pytest.raises(CapacityError, match="full budgets never evict"):
            model.generate(random_ids(1, 61), past_key_values=xkv_fx.Cache(model, budgets), **GREEDY)


def test_inductor_writes_caches_in_place_and_copies_none() -> None:
    torch._dynamo.reset()
    budgets = Budgets((256, 128))
    plain, ids = llama(2, head_dim=32), random_ids(1, 300)
    model = compiled(llama(2, head_dim=32), budgets, lower="inductor")
    cache = xkv_fx.Cache(model, budgets)
    expected = xkv_fx.transform(plain, budgets, backend="eager", check=False).generate(ids, **GREEDY)
    text = model.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(text, expected)
    pointers = [tensor.data_ptr() for tensor in cache.session.state.tensors]
    step: dict[str, Any] = {"past_key_values": cache, "do_sample": False, "max_new_tokens": 1}
    text = model.generate(text, attention_mask=torch.ones_like(text), **step)
    sizes = memory_changes(lambda: model.generate(text, attention_mask=torch.ones_like(text), **step))
    assert sizes, "the profiler saw no allocation at all"
    assert max(sizes) < 2 * 128 * 32 * 4 // 2, "half of the smaller layer's keys"
    assert [tensor.data_ptr() for tensor in cache.session.state.tensors] == pointers
    assert "compiled by Inductor" in cache.describe()
