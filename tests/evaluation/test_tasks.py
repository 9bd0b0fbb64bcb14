"""Examples of every task: made by a seed, exactly as long as asked, and solvable."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from word_tokenizer import WordTokenizer

from xkv_fx.errors import PromptError
from xkv_fx.evaluation.tasks import NEEDLES, Instance, make_instances, register_task, task_names
from xkv_fx.evaluation.tasks.common_words import COMMON
from xkv_fx.evaluation.tasks.words import NOUNS

NAMES = ("needle_single", "needle_multi_key", "needle_multi_value", "variable_tracking", "common_words", "passage_qa")
LENGTHS = (320, 777)


def test_registered_names() -> None:
    assert set(task_names()) == set(NAMES)
    assert set(NEEDLES) < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", LENGTHS)
def test_prompts_are_exactly_as_long_as_asked(name: str, length: int) -> None:
    for instance in make_instances(name, WordTokenizer(), length, count=4):
        assert instance.context.shape[1] + instance.question.shape[1] == length
        assert instance.prompt.shape == (1, length)
        assert instance.prompt.dtype == torch.int64


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_everything(name: str) -> None:
    tokenizer = WordTokenizer()
    made = make_instances(name, tokenizer, 400, count=5, seed=3)
    again = make_instances(name, tokenizer, 400, count=3, seed=3)
    for one, other in zip(made, again, strict=False):
        assert torch.equal(one.prompt, other.prompt)
        assert one.answers == other.answers
    other_seed = make_instances(name, tokenizer, 400, count=5, seed=4)
    assert len({instance.answers for instance in (*made, *other_seed)}) > 5, "examples differ"


def texts(name: str, length: int = 400, count: int = 6) -> list[tuple[str, str, Instance]]:
    tokenizer = WordTokenizer()
    made = make_instances(name, tokenizer, length, count)
    return [(tokenizer.decode(i.context[0].tolist()), tokenizer.decode(i.question[0].tolist()), i) for i in made]


@pytest.mark.parametrize("name", [*NEEDLES, "passage_qa"])
def test_each_answer_is_in_the_context_once_and_not_in_the_question(name: str) -> None:
    for context, question, instance in texts(name):
        for answer in instance.answers:
            assert context.count(answer) == 1
            assert answer not in question


def test_a_needle_goes_with_its_key() -> None:
    for context, question, instance in texts("needle_multi_key"):
        key = re.search(r"for (\S+) in the text", question)
        assert key is not None
        assert f"for {key[1]} is: {instance.answers[0]}." in context
        assert context.count("One of the secret numbers for") == 4


def test_all_values_have_one_key() -> None:
    for context, _, instance in texts("needle_multi_value"):
        keys = re.findall(r"secret numbers for (\S+) is: (\d+)\.", context)
        assert len({key for key, _ in keys}) == 1
        assert sorted(value for _, value in keys) == sorted(instance.answers)
        assert len(instance.answers) == 4


def test_variables_form_one_chain() -> None:
    for context, question, instance in texts("variable_tracking"):
        value = re.search(r"value (\d+)", question)
        assert value is not None
        assert context.count(value[1]) == 1
        assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", context))
        holding = [name for name in assigned if _value(name, assigned) == value[1]]
        assert tuple(holding) == instance.answers, "in the order of the text"


def _value(name: str, assigned: dict[str, str]) -> str:
    while name in assigned:
        name = assigned[name]
    return name


def test_common_words_are_by_far_the_most_common() -> None:
    for context, _, instance in texts("common_words", length=600):
        counts = {word: len(re.findall(rf"\b{word}\b", context)) for word in NOUNS}
        ranked = sorted(counts, key=lambda word: -counts[word])
        assert set(ranked[:COMMON]) == set(instance.answers)
        assert counts[ranked[COMMON - 1]] >= 3 * counts[ranked[COMMON]]


def test_a_prompt_starts_as_the_tokenizer_starts_one() -> None:
    tokenizer = WordTokenizer(start=1)
    for name in NAMES:
        (instance,) = make_instances(name, tokenizer, 400, 1)
        assert instance.context[0, 0] == 1
        assert int((instance.prompt == 1).sum()) == 1


def test_the_score_is_the_share_of_the_answers_found() -> None:
    ids = torch.ones(1, 1, dtype=torch.int64)
    instance = Instance(ids, ids, ("Lisbon", "Oslo"), 8)
    assert instance.score("in LISBON.") == 0.5
    assert instance.score("Oslo, Lisbon, Lima") == 1.0
    assert instance.score("") == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_too_short_a_length_is_refused_by_name(name: str) -> None:
    with pytest.raises(PromptError, match=f"task '{name}': 40 tokens are too few"):
        make_instances(name, WordTokenizer(), 40, 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("needles", {}, "unknown task 'needles'; choose from needle_single"),
        ("needle_single", {"length": 0}, "length must be a whole number of at least 1; got 0"),
        ("needle_single", {"length": 400.0}, "length must be a whole number"),
        ("needle_single", {"count": 0}, "count must be a whole number of at least 1; got 0"),
        ("needle_single", {"seed": -1}, "seed must be a whole number of at least 0; got -1"),
    ],
)
def test_bad_input_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        make_instances(name, WordTokenizer(), **{"length": 400, "count": 1, **options})


def test_a_name_is_taken_once_and_lengths_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkv_fx.evaluation.tasks.base._tasks", {})

    @register_task("short")
    def short(encoder: Any, rng: np.random.Generator, length: int) -> Instance:
        return Instance(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64), ("a",), 1)

    with pytest.raises(PromptError, match="'short' is registered already"):
        register_task("short")(short)
    assert make_instances("short", WordTokenizer(), 3, 1)[0].prompt.shape == (1, 3)
    with pytest.raises(PromptError, match="made a prompt of 3 tokens instead of 4"):
        make_instances("short", WordTokenizer(), 4, 1)
