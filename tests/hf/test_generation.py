"""`generate` over budgeted graphs: with full budgets it is transformers' own; what it cannot do is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import padded
from ready_models import FULL, full, model, transform_again, transformed
from tiny_models import POSITIONS, llama, mistral, random_ids
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.errors import (
    BackendError,
    CapacityError,
    ModelMismatchError,
    PromptError,
    SessionError,
    UnsupportedModelError,
)
from xkv_fx.hf.cache import SessionCache
from xkv_fx.hf.generation import BudgetedLM

TIGHT = Budgets((12, 17))
SCORED = Budgets((12, 17), Policy(eviction="scored"))
APPEND = Budgets((12, 17), Policy(eviction="append"))
ROOM = 10
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}


def append_llm() -> BudgetedLM:
    return transformed(APPEND, max_new_tokens=ROOM)


def both(llm: BudgetedLM, ids: Tensor, **options: Any) -> tuple[Any, Any]:
    """What a transformed model and its original generate, from the same random state."""
    results = []
    for source in (llm, model()):
        torch.manual_seed(7)
        results.append(source.generate(ids, **options))
    return results[0], results[1]


def assert_same(llm: BudgetedLM, ids: Tensor, **options: Any) -> None:
    got, expected = both(llm, ids, **options)
    assert torch.equal(got, expected)


# Full budgets are transformers' own


@pytest.mark.parametrize("length", [1, 2, 3, 24, FULL - 20])
def test_greedy_tokens_and_logits_are_the_models(length: int) -> None:
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    got, expected = both(full(), random_ids(1, length), **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.logits) == 20
    torch.testing.assert_close(torch.cat(got.logits), torch.cat(expected.logits), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(got.scores), torch.cat(expected.scores), atol=1e-4, rtol=0)
    assert isinstance(got.past_key_values, SessionCache)
    assert got.past_key_values.tokens_seen.tolist() == [length + 19]


def test_forward_computes_the_logits_of_every_token() -> None:
    ids = random_ids(1, 15)
    with torch.no_grad():
        expected = model()(ids).logits
    torch.testing.assert_close(full()(ids).logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(full()(ids, logits_to_keep=1).logits, expected[:, -1:], atol=1e-4, rtol=0)


def test_double_precision_is_not_lost() -> None:
    """Prefill, a turn and decode of layers with a sliding window, for which there is no flash kernel."""
    source = mistral(2).double()
    llm, ids = xkv_fx.transform(source, Budgets.full(2, FULL), backend="eager"), random_ids(1, 40)
    session = llm.new_session()
    parts = [llm(ids[:, part], past_key_values=session).logits for part in (slice(0, 21), slice(21, 37))]
    parts += [llm(ids[:, t : t + 1], past_key_values=session, decoding=True).logits for t in range(37, 40)]
    with torch.no_grad():
        expected = source(ids).logits
    assert expected.dtype == torch.float64
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "top_k": 15, "top_p": 0.9},
        {"min_p": 0.05, "repetition_penalty": 1.3},
    ],
    ids=["plain", "warped", "penalised"],
)
def test_sampling_draws_the_same_tokens(options: dict[str, Any]) -> None:
    assert_same(full(), random_ids(1, 9), do_sample=True, max_new_tokens=20, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"bad_words_ids": [[20], [30, 40]], "min_new_tokens": 5},
        {"suppress_tokens": [10, 20, 30], "forced_eos_token_id": 2},
        {"logits_processor": [lambda ids, scores: scores.roll(1, dims=-1)]},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(10, 30))},
    ],
    ids=["repetition", "bad words", "suppressed", "processor", "prefix"],
)
def test_logits_processors_work(options: dict[str, Any]) -> None:
    assert_same(full(), random_ids(1, 9), **GREEDY, **options)


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (1, {"num_beams": 4}),
        (1, {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True}),
        (2, {"num_beams": 2, "num_return_sequences": 2}),
        (1, {"num_beams": 4, "do_sample": True, "temperature": 0.9}),
        (1, {"num_return_sequences": 4, "do_sample": True}),
        (2, {"num_return_sequences": 2, "do_sample": True}),
        (4, {}),
    ],
    ids=["beams", "returned beams", "two rows", "sampled beams", "returned", "returned of two rows", "rows"],
)
def test_beams_and_return_sequences_are_rows(batch: int, options: dict[str, Any]) -> None:
    ids = random_ids(batch, 9)
    assert_same(full(rows=4), ids, **{**GREEDY, "eos_token_id": 11, "pad_token_id": 0, **options})


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_another_number_of_rows_is_refused(batch: int) -> None:
    with pytest.raises(PromptError, match=f"got {batch} rows.*batch_size=4.*batch_size={batch}"):
        full(rows=4).generate(random_ids(batch, 5), **GREEDY)


def test_end_tokens_end() -> None:
    ids = random_ids(1, 9)
    unended = model().generate(ids, **GREEDY)[0, 9:].tolist()
    end = next(token for index, token in enumerate(unended[4:], 4) if token not in unended[:index])
    got, expected = both(full(), ids, **GREEDY, eos_token_id=[end, 0])
    assert torch.equal(got, expected)
    assert got[0, -1] == end
    assert got.shape[1] < 9 + 20


def test_end_tokens_of_the_generation_config(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(1, 9)
    end = int(model().generate(ids, **GREEDY)[0, 14])
    for source in (model(), full()):
        monkeypatch.setattr(source.generation_config, "eos_token_id", end)
    assert_same(full(), ids, **GREEDY)
    assert full().generate(ids, **GREEDY)[0, -1] == end


class Collected(BaseStreamer):
    """A streamer as users write them; it keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_the_prompt_and_then_each_token() -> None:
    ids, streamer = random_ids(1, 6), Collected()
    sequence = full().generate(ids, streamer=streamer, **GREEDY)
    assert streamer.parts == [ids[0].tolist(), *([token] for token in sequence[0, 6:].tolist())]
    assert streamer.ended == 1


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.calls += 1
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_stopping_criteria_stop() -> None:
    criterion = StopAt(13)
    got = full().generate(random_ids(1, 9), stopping_criteria=StoppingCriteriaList([criterion]), **GREEDY)
    assert torch.equal(got, model().generate(random_ids(1, 9), do_sample=False, max_new_tokens=4))
    assert criterion.calls == 4


def test_max_length_counts_the_prompt() -> None:
    assert_same(full(), random_ids(1, 9), do_sample=False, max_length=17)


def test_without_a_prompt_generation_starts_from_the_start_token() -> None:
    got, expected = both(full(), None, **GREEDY)  # type: ignore[arg-type]
    assert torch.equal(got, expected)
    assert got[0, 0] == 1


# Ragged batches

ROWS = [random_ids(1, length, seed=length) for length in (4, 13, 9, 30)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budgets", [Budgets.full(2, FULL), TIGHT], ids=["full", "tight"])
def test_padded_rows_are_as_they_are_alone(budgets: Budgets, side: str) -> None:
    ids, mask = padded(ROWS, side)
    together = transformed(budgets, rows=4).generate(ids, attention_mask=mask.long(), **GREEDY)
    for index, row in enumerate(ROWS):
        alone = transformed(budgets).generate(row, **GREEDY)
        assert torch.equal(together[index, ids.shape[1] :], alone[0, row.shape[1] :])
        if budgets.policy.eviction == "none":
            assert torch.equal(alone, model().generate(row, **GREEDY))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_of_forward_are_as_they_are_alone(side: str) -> None:
    ids, mask = padded(ROWS, side)
    logits = full(rows=4)(ids, attention_mask=mask.long()).logits
    with torch.no_grad():
        for index, row in enumerate(ROWS):
            torch.testing.assert_close(logits[index, mask[index]], model()(row).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_conversations_go_on(side: str) -> None:
    llm = full(rows=4)
    session = llm.new_session()
    ids, mask = padded(ROWS, side)
    first = llm.generate(ids, attention_mask=mask.long(), past_key_values=session, max_new_tokens=6, do_sample=False)
    turn = random_ids(4, 5, seed=77)
    whole = torch.cat((first, turn), 1)
    mask = torch.cat((mask, torch.ones(4, 11, dtype=torch.bool)), 1)
    got = llm.generate(whole, attention_mask=mask.long(), past_key_values=session, **GREEDY)
    for index in range(4):
        row = whole[index][mask[index]][None]
        assert torch.equal(got[index, whole.shape[1] :], model().generate(row, **GREEDY)[0, row.shape[1] :])
    assert session.tokens_seen.tolist() == [row.shape[1] + 6 + 5 + 19 for row in ROWS]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0, 1, 1]], "holes"),
        ([[0, 0, 0, 0, 0]], "nothing but padding; give every row at least one token"),
        ([[1, 1, 1]], "3 columns for 5 tokens"),
    ],
    ids=["holes", "padding only", "too short"],
)
def test_bad_masks_are_refused(mask: list[list[int]], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        full().generate(random_ids(1, 5), attention_mask=torch.tensor(mask), **GREEDY)


def test_a_row_of_padding_is_refused_wherever_it_comes_from() -> None:
    llm, ids = full(rows=4), random_ids(4, 6)
    mask = torch.ones_like(ids)
    mask[2] = 0
    with pytest.raises(PromptError, match="a row of the prompt is nothing but padding"):
        llm.generate(ids, attention_mask=mask, **GREEDY)
    with pytest.raises(PromptError, match="a row of the prompt is nothing but padding"):
        llm.generate(ids, attention_mask=mask, prefill_chunk_size=2, **GREEDY)
    with pytest.raises(PromptError, match="a row of the prompt is nothing but padding"):
        llm.generate(ids * mask, **GREEDY)  # transformers takes token 0 for padding
    with pytest.raises(PromptError, match="a row of the prompt is nothing but padding"):
        llm(ids, attention_mask=mask)


# Sessions


def test_a_conversation_goes_on_from_its_session() -> None:
    llm = full()
    session = llm.new_session()
    conversation = random_ids(1, 7)
    for turn in range(4):
        expected = model().generate(conversation, max_new_tokens=5, do_sample=False)
        conversation = llm.generate(conversation, past_key_values=session, max_new_tokens=5, do_sample=False)
        assert torch.equal(conversation, expected)
        assert session.get_seq_length() == conversation.shape[1] - 1, "the last token was not fed yet"
        assert session.tokens_seen.tolist() == [conversation.shape[1] - 1]
        conversation = torch.cat((conversation, random_ids(1, turn, seed=turn)), 1)
    session.reset()
    again = llm.generate(random_ids(1, 7), past_key_values=session, **GREEDY)
    assert torch.equal(again, model().generate(random_ids(1, 7), **GREEDY))


def test_a_turn_is_not_computed_again() -> None:
    """Only the new tokens of a conversation reach the graphs."""
    llm, session = full(), full().new_session()
    fed: list[int] = []
    feed = session.feed

    def watch(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fed.append(ids.shape[1])
        return feed(ids, *args, **kwargs)

    session.feed = watch  # type: ignore[method-assign]
    conversation = llm.generate(random_ids(1, 7), past_key_values=session, max_new_tokens=3, do_sample=False)
    llm.generate(torch.cat((conversation, random_ids(1, 4)), 1), past_key_values=session, max_new_tokens=3)
    assert fed == [7, 1 + 4]


def test_without_a_session_generation_starts_empty() -> None:
    llm = transformed(TIGHT)
    first = llm.generate(random_ids(1, 20), **GREEDY)
    llm.generate(random_ids(1, 33, seed=5), **GREEDY)
    assert torch.equal(llm.generate(random_ids(1, 20), **GREEDY), first)


@pytest.mark.parametrize("size", [1, 5, 23, 64])
def test_prefill_in_chunks_is_prefill_in_one(size: int) -> None:
    assert_same(full(), random_ids(1, 23), **GREEDY, prefill_chunk_size=size)


@pytest.mark.parametrize("size", [1, 3, 10, 27])
def test_a_padded_batch_is_prefilled_in_chunks(size: int) -> None:
    """The first chunks hold nothing but padding of some rows."""
    ids, mask = padded(ROWS, "left")
    options = {**GREEDY, "attention_mask": mask.long(), "output_logits": True, "return_dict_in_generate": True}
    got = full(rows=4).generate(ids, prefill_chunk_size=size, **options)
    expected = model().generate(ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("budgets", [TIGHT, SCORED, APPEND], ids=["ring", "scored", "append"])
def test_a_row_that_starts_late_is_as_it_is_alone(budgets: Budgets) -> None:
    """Rows whose first chunks are padding keep what they would keep without them, and without the other rows."""
    size = 5
    ids, mask = padded(ROWS, "left")
    together = transformed(budgets, rows=4, max_new_tokens=19)
    session = together.new_session()
    for start in range(0, ids.shape[1], size):
        part = slice(start, start + size)
        last = together(ids[:, part], attention_mask=mask[:, part], past_key_values=session, logits_to_keep=1).logits
    for index, row in enumerate(ROWS):
        llm = transformed(budgets, max_new_tokens=19)
        alone = llm.new_session()
        for start in range(0, ids.shape[1], size):
            tokens = ids[index, start : start + size][mask[index, start : start + size]][None]
            if tokens.shape[1]:
                expected = llm(tokens, past_key_values=alone, logits_to_keep=1).logits
        torch.testing.assert_close(last[index], expected[0], atol=1e-4, rtol=0)
        for layer in range(2):
            assert torch.equal(session.kept_positions(layer)[index], alone.kept_positions(layer)[0])
        assert int(session.tokens_seen[index]) == row.shape[1]


def test_right_padding_beyond_the_last_chunk_is_refused() -> None:
    """The row's first new token would follow padding, for its own last token was fed in an earlier chunk."""
    llm = full(rows=4)
    ids, mask = padded(ROWS, "right")
    options = {**GREEDY, "attention_mask": mask.long()}
    with pytest.raises(
        PromptError, match="has no token among the last 10 columns, which are fed at once; pad on the left"
    ):
        llm.generate(ids, prefill_chunk_size=10, **options)
    session = llm.new_session()
    first = llm.generate(ids, prefill_chunk_size=ids.shape[1], past_key_values=session, **options)
    turn = torch.ones(4, 20 + 3, dtype=torch.int64)
    turn[1, -4:] = 0  # the last token that was generated, and a turn of three
    options["attention_mask"] = torch.cat((options["attention_mask"], turn), 1)
    with pytest.raises(PromptError, match="has no token among the last 4 columns"):
        llm.generate(torch.cat((first, random_ids(4, 3)), 1), past_key_values=session, **options)


@pytest.mark.parametrize("budgets", [Budgets.full(2, FULL), TIGHT], ids=["full", "tight"])
def test_sessions_do_not_disturb_each_other(budgets: Budgets) -> None:
    llm = transformed(budgets)
    prompts = [random_ids(1, length, seed=length) for length in (8, 31)]
    alone = [llm.generate(prompt, **GREEDY) for prompt in prompts]
    sessions = [llm.new_session() for _ in prompts]
    told = []
    for prompt, session in zip(prompts, sessions, strict=True):
        told.append([llm(prompt, past_key_values=session, logits_to_keep=1).logits.argmax(-1)])
    for _ in range(19):
        for session, tokens in zip(sessions, told, strict=True):
            tokens.append(llm(tokens[-1], past_key_values=session, decoding=True).logits.argmax(-1))
    for prompt, tokens, expected in zip(prompts, told, alone, strict=True):
        assert torch.equal(torch.cat((prompt, *tokens), 1), expected)


def test_threads_share_one_model() -> None:
    llm = transform_again(TIGHT)  # whose graphs for turns are built when a thread first needs them
    prompts = [random_ids(1, length, seed=length) for length in (5, 18, 27, 40)]
    expected = [transformed(TIGHT).generate(prompt, **GREEDY) for prompt in prompts]
    results: dict[int, Tensor] = {}

    def work(index: int) -> None:
        session = llm.new_session()
        first = llm.generate(prompts[index], past_key_values=session, max_new_tokens=1, do_sample=False)
        rest = llm.generate(first, past_key_values=session, max_new_tokens=1, do_sample=False)
        assert rest.shape[1] == first.shape[1] + 1
        results[index] = llm.generate(prompts[index], **GREEDY)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, tokens in enumerate(expected):
        assert torch.equal(results[index], tokens)


@pytest.mark.parametrize("budgets", [Budgets.full(2, FULL), TIGHT], ids=["full", "tight"])
def test_a_fork_goes_its_own_way(budgets: Budgets) -> None:
    llm = transformed(budgets)
    session = llm.new_session()
    prefix = llm.generate(random_ids(1, 20), past_key_values=session, max_new_tokens=5, do_sample=False)
    fork = session.fork()
    questions = [torch.cat((prefix, random_ids(1, 4, seed=seed)), 1) for seed in (1, 2)]
    answers = [llm.generate(q, past_key_values=s, **GREEDY) for q, s in zip(questions, (session, fork), strict=True)]
    for question, answer in zip(questions, answers, strict=True):
        again = llm.new_session()
        llm.generate(random_ids(1, 20), past_key_values=again, max_new_tokens=5, do_sample=False)
        assert torch.equal(llm.generate(question, past_key_values=again, **GREEDY), answer)
    assert not torch.equal(answers[0], answers[1])
    assert session.kv_bytes == fork.kv_bytes == llm.kv_bytes
    pointers = [{tensor.data_ptr() for tensor in each.session.state.tensors} for each in (session, fork)]
    assert not pointers[0] & pointers[1]


# Memory


@pytest.mark.parametrize("rows", [1, 4])
def test_kv_bytes_are_the_plans_and_the_tensors_and_stay(rows: int) -> None:
    llm = transformed(TIGHT, rows=rows)
    session = llm.new_session()
    planned = TIGHT.kv_bytes(model(), batch_size=rows)
    assert planned == (12 + 17) * 2 * (8 + 8) * 4 * rows

    def held() -> tuple[list[int], int]:
        state = session.session.state
        named = zip(state.buffers, state.tensors, strict=True)
        return [t.data_ptr() for t in state.tensors], sum(
            t.untyped_storage().nbytes() for buffer, t in named if buffer.holds == "kv"
        )

    before = held()
    assert planned == before[1] == llm.kv_bytes == session.kv_bytes == TIGHT.kv_bytes(llm, batch_size=rows)
    ids = llm.generate(random_ids(rows, 40), past_key_values=session, max_new_tokens=20, do_sample=False)
    ids = torch.cat((ids, random_ids(rows, 9)), 1)
    llm.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=session, max_new_tokens=9)
    assert held() == before
    assert session.kv_bytes == planned
    everything = sum(tensor.untyped_storage().nbytes() for tensor in session.session.state.tensors)
    assert session.state_bytes == llm.state_bytes == everything - planned


def test_bytes_stay_over_300_generated_tokens() -> None:
    llm = transformed(TIGHT)
    session = llm.new_session()
    pointers = [tensor.data_ptr() for tensor in session.session.state.tensors]
    sequence = llm.generate(random_ids(1, 30), past_key_values=session, max_new_tokens=300, do_sample=False)
    assert sequence.shape == (1, 330)
    assert [tensor.data_ptr() for tensor in session.session.state.tensors] == pointers
    assert session.kv_bytes == TIGHT.kv_bytes(llm)
    assert session.tokens_seen.tolist() == [329]
    newest = set(range(329 - 3, 329))
    for layer in (0, 1):
        for head in session.kept_positions(layer)[0].tolist():
            assert newest <= set(head)


def test_room_to_append_is_part_of_the_bytes() -> None:
    llm = append_llm()
    assert llm.kv_bytes == llm.budgets.kv_bytes(model(), max_new_tokens=ROOM) == (12 + 17 + 2 * ROOM) * 2 * 16 * 4


def test_positions_go_on_counting_after_eviction() -> None:
    llm, seen = transformed(TIGHT), []
    session = llm.new_session()
    step = session.step

    def watch(ids: Tensor, position_ids: Tensor | None) -> Tensor:
        assert position_ids is None or position_ids.shape == ids.shape
        seen.append(session.tokens_seen.item() if position_ids is None else position_ids.item())
        return step(ids, position_ids)

    session.step = watch  # type: ignore[method-assign]
    llm.generate(random_ids(1, 40), past_key_values=session, **GREEDY)
    assert seen == list(range(40, 59))


# Limits


def test_full_budgets_refuse_more_tokens_and_the_session_stays_usable() -> None:
    llm = full()
    session = llm.new_session()
    start = llm.generate(random_ids(1, FULL - 5), past_key_values=session, max_new_tokens=2, do_sample=False)
    message = (
        "20 new tokens are asked for, and 4 can be generated from here: "
        f"{FULL + 1} tokens do not fit into the {FULL} slots"
    )
    with pytest.raises(CapacityError, match=message):
        llm.generate(start, past_key_values=session, **GREEDY)
    assert session.tokens_seen.tolist() == [FULL - 4]
    assert llm.generate(start, past_key_values=session, max_new_tokens=4).shape == (1, FULL + 1)
    assert session.tokens_seen.tolist() == [FULL]
    with pytest.raises(CapacityError, match=f"{FULL + 1} tokens do not fit into the {FULL} slots"):
        llm.generate(random_ids(1, FULL + 1), **GREEDY)


def test_appending_beyond_the_room_is_refused() -> None:
    """Before any token is streamed."""
    ids, heard = random_ids(1, 30), Collected()
    assert append_llm().generate(ids, do_sample=False, max_new_tokens=ROOM + 1).shape == (1, 30 + ROOM + 1)
    for chunk in (None, 4):
        options = {"do_sample": False, "max_new_tokens": ROOM + 2, "prefill_chunk_size": chunk}
        message = (
            f"{ROOM + 2} new tokens are asked for, and {ROOM + 1} can be generated from here: "
            f"the room for {ROOM} appended tokens .* is used up"
        )
        with pytest.raises(CapacityError, match=message):
            append_llm().generate(ids, streamer=heard, **options)
    assert [len(part) for part in heard.parts] == [30, 30], "the prompts"


def test_more_tokens_than_positions_are_refused() -> None:
    llm = transformed(TIGHT)
    with pytest.raises(PromptError, match=f"{POSITIONS + 1} tokens are more than the model's {POSITIONS} positions"):
        llm.generate(random_ids(1, POSITIONS + 1), **GREEDY)
    session = llm.new_session()
    message = (
        "20 new tokens are asked for, and 6 can be generated from here: "
        f"{POSITIONS + 1} tokens are more than the model's {POSITIONS} positions"
    )
    with pytest.raises(PromptError, match=message):
        llm.generate(random_ids(1, POSITIONS - 5), past_key_values=session, **GREEDY)
    assert session.tokens_seen.tolist() == [0]
    assert llm.generate(random_ids(1, POSITIONS - 5), max_new_tokens=6).shape == (1, POSITIONS + 1)


# Refusals


CACHES: dict[str, tuple[Callable[[], Any], str]] = {
    "DynamicCache": (DynamicCache, "a DynamicCache has no bounded memory"),
    "tuple": (lambda: ((torch.zeros(1), torch.zeros(1)),), "a tuple has no bounded memory"),
    "another model's session": (lambda: full().new_session(), "belongs to another transformed model"),
    "another batch's session": (lambda: transformed(TIGHT, rows=4).new_session(), "belongs to another transformed"),
}


@pytest.mark.parametrize("case", CACHES)
def test_other_caches_are_refused(case: str) -> None:
    make, message = CACHES[case]
    llm = transformed(TIGHT)
    with pytest.raises(SessionError, match=message):
        llm.generate(random_ids(1, 5), past_key_values=make(), **GREEDY)
    with pytest.raises(SessionError, match=message):
        llm(random_ids(1, 5), past_key_values=make())


def test_a_session_is_of_no_use_to_another_model() -> None:
    session = full().new_session()
    with pytest.raises(SessionError, match="belongs to a transformed model"):
        model().generate(random_ids(1, 5), past_key_values=session, **GREEDY)
    with pytest.raises(SessionError, match="cannot be cropped"):
        session.crop(3)


OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "use_cache": ({"use_cache": False}, SessionError, "use_cache=False makes no sense"),
    "static cache": ({"cache_implementation": "static"}, SessionError, "cache_implementation='static' cannot be"),
    "offloaded cache": ({"cache_implementation": "offloaded"}, SessionError, "cannot be chosen"),
    "assistant": ({"assistant_model": "the model"}, SessionError, "assisted generation takes tokens back"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, SessionError, "assisted generation takes tokens back"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 5, 32)}, PromptError, "inputs_embeds is not supported"),
    "hidden states": ({"output_hidden_states": True}, PromptError, "output_hidden_states is not supported"),
    "attentions": ({"output_attentions": True}, PromptError, "output_attentions is not supported"),
    "unknown": ({"temprature": 2.0}, ValueError, "temprature"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be_honoured_are_refused(case: str) -> None:
    options, error, message = OPTIONS[case]
    options = {name: model() if value == "the model" else value for name, value in options.items()}
    session = full().new_session()
    with pytest.raises(error, match=message):
        full().generate(random_ids(1, 5), past_key_values=session, return_dict_in_generate=True, **GREEDY, **options)
    assert session.tokens_seen.tolist() == [0]


def test_a_tuple_for_output_is_refused() -> None:
    session = full().new_session()
    with pytest.raises(PromptError, match="return_dict=False is not supported"):
        full()(random_ids(1, 5), past_key_values=session, return_dict=False)
    assert session.tokens_seen.tolist() == [0]


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_that_the_models_config_asks_for_are_refused(name: str) -> None:
    source = llama(2, attn_implementation="eager")
    setattr(source.config, name, True)
    llm = xkv_fx.transform(source, Budgets.full(2, FULL), backend="eager")
    message = f"{name} is not supported by a transformed model; set it to False in the model's config"
    with pytest.raises(PromptError, match=message):
        llm(random_ids(1, 5))
    with pytest.raises(PromptError, match=f"{name} is not supported"):
        llm.generate(random_ids(1, 5), **GREEDY)
    setattr(source.config, name, False)
    assert torch.equal(llm.generate(random_ids(1, 5), **GREEDY), model().generate(random_ids(1, 5), **GREEDY))


FORWARD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nothing": ({"input_ids": None}, PromptError, "give input_ids"),
    "embeddings": ({"input_ids": None, "inputs_embeds": torch.zeros(1, 5, 32)}, PromptError, "inputs_embeds is not"),
    "use_cache": ({"use_cache": False}, SessionError, "use_cache=False"),
    "labels": ({"labels": random_ids(1, 5)}, PromptError, "labels is not supported"),
    "unknown": ({"foo": 3}, PromptError, "unknown arguments: foo"),
    "some logits": ({"logits_to_keep": 3}, PromptError, "logits_to_keep must be 0"),
    "no tokens": ({"input_ids": random_ids(1, 0)}, PromptError, "the prompt is empty"),
    "floats": ({"input_ids": random_ids(1, 5).float()}, PromptError, "whole numbers, int64.*got torch.float32"),
    "one dimension": ({"input_ids": random_ids(1, 5)[0]}, PromptError, r"int64 \[rows, S\]; got the shape \[5\]"),
    "positions": ({"position_ids": random_ids(1, 4)}, PromptError, "position_ids must be int64"),
    "two decoded": ({"decoding": True}, PromptError, "decode takes one token a row, not 5"),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_ids_of_other_whole_numbers_are_the_same_tokens(dtype: torch.dtype) -> None:
    ids = random_ids(1, 5)
    assert torch.equal(full()(ids.to(dtype)).logits, full()(ids).logits)
    expected = full().generate(ids, **GREEDY)
    for given in ({"inputs": ids.to(dtype)}, {"input_ids": ids.to(dtype)}):
        assert torch.equal(full().generate(**given, **GREEDY), expected)
    session = full().new_session()
    first = full().generate(ids.to(dtype), past_key_values=session, **GREEDY)
    full().generate(torch.cat((first, ids), 1).int(), past_key_values=session, **GREEDY)
    assert session.tokens_seen.tolist() == [first.shape[1] + 5 + 19]


NO_IDS: dict[str, tuple[Any, str]] = {
    "text": ("a text", "got a str. From text they come by"),
    "texts": (["a text"], "got a list"),
    "lists": ([[1, 2, 3]], "got a list"),
    "what a tokenizer returns": ({"input_ids": random_ids(1, 5)}, r"got a dict.*\*\*tokenizer"),
    "one dimension": (random_ids(1, 5)[0], r"got the shape \[5\]"),
    "three": (random_ids(1, 5)[None], r"got the shape \[1, 1, 5\]"),
    "floats": (random_ids(1, 5).float(), "got torch.float32"),
    "truth values": (random_ids(1, 5).bool(), "got torch.bool"),
}


@pytest.mark.parametrize("case", NO_IDS)
def test_what_is_no_ids_is_refused(case: str) -> None:
    given, message = NO_IDS[case]
    for call in (lambda: full().generate(given), lambda: full().generate(inputs=given), lambda: full()(given)):
        with pytest.raises(PromptError, match=message):
            call()


@pytest.mark.parametrize("case", list(FORWARD))
def test_bad_calls_of_forward_are_refused_and_leave_no_trace(case: str) -> None:
    arguments, error, message = FORWARD[case]
    session = full().new_session()
    with pytest.raises(error, match=message):
        full()(**{"input_ids": random_ids(1, 5), "past_key_values": session, **arguments})
    assert session.tokens_seen.tolist() == [0]
    assert session.get_seq_length() == 0


def test_a_new_turn_without_the_conversation_is_refused() -> None:
    llm, session = full(), full().new_session()
    llm.generate(random_ids(1, 9), past_key_values=session, **GREEDY)
    with pytest.raises(PromptError):
        llm.generate(random_ids(1, 4), past_key_values=session, **GREEDY)
    assert session.tokens_seen.tolist() == [28]


@pytest.mark.parametrize(
    "move",
    [lambda llm: llm.to(torch.float16), lambda llm: llm.half(), lambda llm: llm.to("cpu"), lambda llm: llm.double()],
    ids=["to dtype", "half", "to device", "double"],
)
def test_a_transformed_model_is_not_moved_or_cast(move: Callable[[BudgetedLM], Any]) -> None:
    with pytest.raises(BackendError, match="move or cast the model, then transform it"):
        move(full())
    assert (full().dtype, full().device) == (torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("budgets", [TIGHT, Budgets.full(2, FULL)], ids=["tight", "full"])
def test_a_transformed_model_is_not_transformed_again(budgets: Budgets) -> None:
    with pytest.raises(UnsupportedModelError, match="transformed already"):
        xkv_fx.transform(full(), budgets, backend="eager")


# What it is


def test_graphs_can_be_read_and_choices_are_described() -> None:
    llm = transformed(TIGHT)
    for graph in (llm.prefill, llm.extend, llm.decode):
        assert isinstance(graph, torch.fx.GraphModule)
        assert "xkv." in graph.print_readable(print_output=False)
    text = llm.describe()
    for said in ("12", "17", "ring", "SnapKV", "insert_decode_cache", f"{llm.kv_bytes:,}", "LlamaForCausalLM:"):
        assert said in text
    assert llm.budgets == TIGHT
    assert [spec.kv_heads for spec in llm.layers] == [2, 2]
    assert not llm.training


def test_weights_are_shared() -> None:
    source = llama(2, tie_word_embeddings=True)
    llm = xkv_fx.transform(source, Budgets.full(2, FULL), backend="eager")
    ids = random_ids(1, 9)
    session = llm.new_session()
    llm(ids, past_key_values=session)
    logits = [session.fork().step(ids[:, :1], None)]
    for factor in (2.0, 0.5):
        with torch.no_grad():
            source.lm_head.weight.mul_(factor)
            source.model.layers[1].mlp.down_proj.weight.mul_(-factor)
        logits.append(session.fork().step(ids[:, :1], None))
    assert torch.equal(logits[2], logits[0])
    assert not torch.allclose(logits[1], logits[0], atol=0.1)
    with pytest.raises(ModelMismatchError, match="changed in place after the model was transformed"):
        llm.generate(ids, **GREEDY)


def test_what_is_set_for_generation_is_not_set_on_the_model() -> None:
    llm = transform_again(Budgets.full(2, FULL))
    llm.generation_config.pad_token_id = 5
    other = llm.with_budgets(Budgets.full(2, FULL + 1))
    other.generation_config.pad_token_id = 6
    assert (llm.generation_config.pad_token_id, model().generation_config.pad_token_id) == (5, 0)
