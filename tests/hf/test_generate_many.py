"""`generate_many`: every answer is the one that the request gets alone, whatever runs beside it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import hybrid_models
import pytest
import torch
from exhaustive import exhaustive
from ready_models import FULL, captured, model
from tiny_models import POSITIONS, VOCABULARY, llama
from torch import Tensor

import xkv_fx
from xkv_fx import Answer, Budgets, Policy, Request
from xkv_fx.errors import CapacityError, PromptError
from xkv_fx.hf.generation import BudgetedLM
from xkv_fx.lowering.program import compile_program

ROWS = 3
LENGTHS = (24, 1, 7, 40, 13, 31, 2, 18)
ROOM = 24
PLANS = {
    "full": Budgets.full(2, FULL),
    "ring": Budgets((12, 17)),
    "scored": Budgets((12, 17), Policy(eviction="scored", sinks=2)),
    "append": Budgets((12, 17), Policy(eviction="append")),
    "reading again": Budgets(
        (12, 17), Policy(scorer="reconstruction", scorer_options={"chunk": 11, "instruction": "3 4"})
    ),
    "int8": Budgets((12, 17), formats=(("int8", "int4"), ("int8", "int8"))),
}


@functools.cache
def served(name: str, rows: int = ROWS, family: str = "llama") -> BudgetedLM:
    source, program = model(family), compile_program(captured(family, 2, rows), PLANS[name], "eager", ROOM)
    return BudgetedLM(source.config, source.generation_config, PLANS[name], program, lambda: captured(family, 2, 1))


def prompts(lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def requests() -> list[Request]:
    """Answers of 1 to 20 tokens, so that rows end at different times."""
    return [Request(ids, 1 + (7 * index) % 20) for index, ids in enumerate(prompts())]


def alone(name: str, request: Request, **options: Any) -> tuple[int, ...]:
    ids = request.prompt[None]
    output = served(name, 1).generate(ids, max_new_tokens=request.max_new_tokens, do_sample=False, **options)
    return tuple(output[0, ids.shape[1] :].tolist())


class Letters:
    """A tokenizer of 61 characters; token 60 is special, and 59 the first half of a character."""

    def __repr__(self) -> str:  # it names a test, which must be the same in every process
        return "Letters()"

    def __call__(self, text: str) -> dict[str, list[int]]:
        if "!" in text:
            raise OverflowError("no such letter\nat all")
        return {"input_ids": [ord(letter) - ord("A") for letter in text]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join("\N{REPLACEMENT CHARACTER}" if token == 59 else chr(ord("A") + token) for token in ids)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 9}], ids=["whole", "chunks"])
def test_every_answer_is_the_one_it_gets_alone(name: str, options: dict[str, int]) -> None:
    asked = requests()
    answers = list(served(name).generate_many(asked, prompt_tokens_per_step=11, **options))
    assert [answer.index for answer in answers] == list(range(len(asked)))
    for request, answer in zip(asked, answers, strict=True):
        assert answer.ids == alone(name, request, **options)
        assert (answer.reason, answer.error, answer.text) == ("length", None, None)
        assert answer.prompt_tokens == len(request.prompt)
        assert answer.shared_tokens == 0


def test_a_family_with_a_sliding_window() -> None:
    one = served("ring", 1, "mistral")
    for ids, answer in zip(prompts(), served("ring", ROWS, "mistral").generate_many(prompts(), 9), strict=True):
        assert answer.ids == tuple(one.generate(ids[None], max_new_tokens=9, do_sample=False)[0, len(ids) :].tolist())


def test_transform_captures_the_row_beside_the_batch_when_it_is_needed() -> None:
    llm = xkv_fx.transform(llama(), PLANS["ring"], ROWS, backend="eager", check=False)
    smaller = llm.with_budgets(Budgets((8, 8)))
    asked = requests()
    assert [answer.ids for answer in llm.generate_many(asked)] == [alone("ring", request) for request in asked]
    assert len(list(smaller.generate_many(asked))) == len(asked)
    assert llm._one_row().graphs.captured is smaller._one_row().graphs.captured


def test_one_row() -> None:
    asked = requests()
    assert [answer.ids for answer in served("ring", 1).generate_many(asked)] == [alone("ring", one) for one in asked]


def test_as_they_end() -> None:
    asked = requests()
    order = [answer.index for answer in served("full").generate_many(asked, in_order=False)]
    assert sorted(order) == list(range(len(asked)))
    assert order != sorted(order)


@pytest.mark.parametrize("pace", [1, 5, 1000])
def test_running_rows_wait_for_no_more_than_was_said(pace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two decode steps prompts are fed for `pace` tokens, and what one layer takes on top at most."""
    llm = served("full")
    fed: list[float] = []
    steps: list[int] = []
    run, decode = llm._one_row().prompt_in_parts, llm.program.decode

    def counted(kind: Any, ids: Tensor, *inputs: Tensor) -> Any:
        running = run(kind, ids, *inputs)
        advance = running.advance

        def advanced() -> Tensor | None:
            fed.append(ids.shape[1] / running.parts)
            return advance()

        monkeypatch.setattr(running, "advance", advanced)
        return running

    def step() -> Any:
        steps.append(len(fed))
        return decode()

    monkeypatch.setattr(llm._one_row(), "prompt_in_parts", counted)
    monkeypatch.setattr(llm.program, "decode", step)
    assert len(list(llm.generate_many(requests(), prompt_tokens_per_step=pace))) == len(LENGTHS)
    largest = max(LENGTHS) / 3
    waits = [sum(fed[one:other]) for one, other in pairwise(steps)]
    assert max(waits) <= pace + largest
    assert sum(fed) == pytest.approx(sum(LENGTHS))


def test_rows_are_kept_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = served("full")
    steps = 0
    decode = llm.program.decode

    def step() -> Any:
        nonlocal steps
        steps += 1
        return decode()

    monkeypatch.setattr(llm.program, "decode", step)
    lengths = (1, 20, 1, 20, 1, 20, 1, 20, 2, 2, 2, 2)
    asked = [Request(ids, count) for ids, count in zip(prompts((5,) * len(lengths)), lengths, strict=True)]
    assert len(list(llm.generate_many(asked))) == len(lengths)
    assert steps <= -(-sum(count - 1 for count in lengths) // ROWS) + 19  # the last one may be alone


def test_a_shared_prefix_is_fed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, fed = served("full"), 0
    run = llm._one_row().prompt_in_parts

    def counted(kind: Any, ids: Tensor, *inputs: Tensor) -> Any:
        nonlocal fed
        fed += ids.shape[1]
        return run(kind, ids, *inputs)

    monkeypatch.setattr(llm._one_row(), "prompt_in_parts", counted)
    prefix = prompts((16,))[0]
    asked = [*(torch.cat((prefix, ids)) for ids in prompts((3, 9, 1))), prefix, prompts((20,))[0], prefix[:5]]
    answers = list(llm.generate_many(asked, 6, prefix=prefix))
    assert [answer.shared_tokens for answer in answers] == [0, 16, 16, 16, 16, 0]
    assert fed == 16 + 3 + 9 + 1 + 0 + 4 + 5
    for ids, answer in zip(asked, answers, strict=True):
        assert answer.ids == alone("full", Request(ids, 6))


def test_the_state_behind_a_prefix_is_that_of_a_conversation() -> None:
    """With budgets that evict, a prefix is a turn of its own."""
    prefix, rest = prompts((30, 12))
    for count in (1, 2):
        answers = list(served("ring").generate_many([torch.cat((prefix, rest))] * count, 8, prefix=prefix))
    session = served("ring", 1).new_session()
    session.feed(prefix[None], None, None, False)
    logits = session.feed(rest[None], None, None, False)
    first = logits[:, -1].argmax(-1, keepdim=True)
    expected = torch.cat((first, served("ring", 1).decode_steps(7, session, first)), 1)
    assert [answer.ids for answer in answers] == [tuple(expected[0].tolist())] * 2


def test_draws_do_not_depend_on_what_runs_beside() -> None:
    llm = served("full")
    options: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_k": 30, "top_p": 0.9}
    together = [answer.ids for answer in llm.generate_many(prompts(), 12, seed=5, **options)]
    for index, ids in enumerate(prompts()):
        (answer,) = llm.generate_many([Request(ids, seed=5 + index)], 12, **options)
        assert answer.ids == together[index]
    assert together != [answer.ids for answer in llm.generate_many(prompts(), 12, seed=6, **options)]
    greedy = llm.generate_many([Request(ids, do_sample=False) for ids in prompts()], 12, seed=5, **options)
    assert [answer.ids for answer in greedy] == [alone("full", Request(ids, 12)) for ids in prompts()]


def test_a_request_that_fails_fails_alone() -> None:
    good = prompts((4, 6))
    asked: list[Any] = [
        good[0], "text", [], [1, VOCABULARY], [1.5], torch.ones(2, 3, dtype=torch.int64), [1] * (FULL + 1), None,
        Request([1] * FULL, 2), Request([1, 2], 0), Request([1, 2], stop="x"), Request([1, 2], stop=3),
        Request([1, 2], do_sample=True, temperature=0), Request([1, 2], seed=0.5), Request([1, 2], top_p=1.5), object(),
        good[1],
    ]  # fmt: skip
    answers = list(served("full").generate_many(asked, 5))
    assert [answer.index for answer in answers if answer.error is None] == [0, len(asked) - 1]
    assert [answers[0].ids, answers[-1].ids] == [alone("full", Request(ids, 5)) for ids in good]
    for answer in answers[1:-1]:
        assert (answer.reason, answer.ids, answer.text) == ("error", (), None)
        assert isinstance(answer.error, PromptError | CapacityError)
    assert "the prompt is a string; pass the model's tokenizer too" in str(answers[1].error)
    assert "the prompt has the token 61, but the model's tokens are 0 to 60" in str(answers[3].error)
    assert f"{FULL + 1} tokens do not fit" in str(answers[6].error)
    assert "2 new tokens are asked for, and 1 can be generated from here" in str(answers[8].error)


def test_a_prompt_longer_than_the_models_positions() -> None:
    long, short = (Request(torch.ones(length, dtype=torch.int64), 3) for length in (POSITIONS - 1, 8))
    answers = list(served("ring").generate_many([long, short]))
    assert f"the model's {POSITIONS} positions" in str(answers[0].error)
    assert answers[1].ids == alone("ring", short)


def test_text_stop_strings_and_end_tokens() -> None:
    llm, letters = served("full"), Letters()
    (whole,) = llm.generate_many(["HELLO"], 12, tokenizer=letters)
    assert whole.text == letters.decode(whole.ids)
    stop = whole.text[4:7]
    (stopped,) = llm.generate_many(["HELLO"], 12, tokenizer=letters, stop=["no", stop])
    assert stopped.reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.ids == whole.ids[: whole.text.index(stop) + 3]
    (ended,) = llm.generate_many(["HELLO"], 12, tokenizer=letters, end_tokens=[whole.ids[5]])
    assert ended.reason == "end"
    assert ended.ids == whole.ids[: whole.ids.index(whole.ids[5]) + 1]
    (wrong,) = llm.generate_many(["HEL!O"], 12, tokenizer=letters)
    assert str(wrong.error) == "the prompt cannot be tokenized: no such letter"


def test_cancelled_requests() -> None:
    llm, asked = served("full"), [Request(ids, 20) for ids in prompts()]
    with llm.generate_many(asked, in_order=False) as answers:
        answers.cancel(6)  # not taken yet
        found = [next(answers)]
        for index in range(len(asked)):
            if index != found[0].index:
                answers.cancel(index)
        found += answers
    assert sorted(answer.index for answer in found) == list(range(len(asked)))
    reasons = {answer.index: answer.reason for answer in found}
    assert reasons[6] == "cancelled"
    assert list(reasons.values()).count("length") < 4
    for answer in found:
        assert answer.ids == alone("full", asked[answer.index])[: len(answer.ids)]
    assert list(answers) == []


def test_requests_are_taken_as_they_are_needed() -> None:
    taken = 0

    def endless() -> Iterator[Tensor]:
        nonlocal taken
        while True:
            taken += 1
            yield prompts((6,))[0]

    with served("full").generate_many(endless(), 4) as answers:
        assert [next(answers).index for _ in range(5)] == list(range(5))
    assert taken <= 5 + ROWS + 2
    with pytest.raises(StopIteration):
        next(answers)


def test_progress() -> None:
    told: list[tuple[int, int]] = []
    answers = served("full").generate_many(prompts(), 3, progress=lambda done, known: told.append((done, known)))
    assert told == []
    assert len(list(answers)) == len(LENGTHS)
    assert told == [(done, len(LENGTHS)) for done in range(1, len(LENGTHS) + 1)]
    told.clear()
    list(served("full").generate_many(iter(prompts((3, 4))), 3, progress=lambda *now: told.append(now)))
    assert told == [(1, 1), (2, 2)]


def test_a_bar_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    list(served("full").generate_many(prompts(), 3, progress=True))
    shown = capsys.readouterr()
    assert f"{len(LENGTHS)}/{len(LENGTHS)}" in shown.err
    assert shown.out == ""


def test_no_requests() -> None:
    assert list(served("full").generate_many([])) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"stop": "x"}, "pass the model's tokenizer"),
        ({"stop": [""], "tokenizer": Letters()}, "at least one character"),
        ({"do_sample": True, "temperature": -1}, "temperature must be above 0"),
        ({"top_p": 0}, "top_p must be"),
        ({"seed": "a"}, "a seed must be"),
        ({"end_tokens": ["a"]}, "end_tokens must be"),
        ({"prefix": []}, "the prefix is empty"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be"),
        ({"prompt_tokens_per_step": None, "requests": "text"}, "requests must be several"),
        ({"prompt_tokens_per_step": 0}, "prompt_tokens_per_step must be"),
    ],
    ids=str,
)
def test_settings_out_of_their_range_are_refused_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PromptError, match=said):
        served("full").generate_many(**{"requests": prompts(), **options})


def test_answers_and_requests_are_frozen() -> None:
    for record in (Answer(0, (), None, "end"), Request("text")):
        with pytest.raises(AttributeError):
            record.index = 3  # type: ignore[misc, union-attr]


def test_weights_that_changed_are_noticed() -> None:
    source = llama()
    llm = xkv_fx.transform(source, PLANS["full"], ROWS, backend="eager", check=False)
    with torch.no_grad():
        source.lm_head.weight.mul_(2)
    with pytest.raises(xkv_fx.ModelMismatchError, match="changed in place"):
        next(llm.generate_many(prompts()))


@pytest.mark.parametrize(
    "family",
    [family if family == "lfm2_moe" else pytest.param(family, marks=exhaustive) for family in hybrid_models.FAMILIES],
)
def test_hybrids_answer_as_they_do_alone(family: str) -> None:
    """The states that layers carry go with their row; an idle row's own is nobody's."""
    own, source = hybrid_models.model(family), hybrid_models.captured(family, 2)
    budgets = Budgets.full(len(source.layers), FULL)
    program = compile_program(source, budgets, "eager")
    llm = BudgetedLM(own.config, own.generation_config, budgets, program, lambda: hybrid_models.captured(family))
    asked = [Request(ids, 1 + (5 * index) % 9) for index, ids in enumerate(prompts((9, 1, 70, 5)))]
    asked = [*asked, Request(prompts((30,))[0], 2)]
    for request, answer in zip(asked, llm.generate_many(asked, end_tokens=()), strict=True):
        ids = request.prompt[None]
        if len(request.prompt) + request.max_new_tokens - 1 > FULL:
            assert isinstance(answer.error, CapacityError)
            continue
        expected = hybrid_models.transformed(family).generate(
            ids, max_new_tokens=request.max_new_tokens, do_sample=False, eos_token_id=None
        )
        assert answer.ids == tuple(expected[0, ids.shape[1] :].tolist())
