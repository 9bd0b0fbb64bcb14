"""What `generate_many` is made of: text that grows, and rows that come and go."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from ready_models import captured
from tiny_models import random_ids

from xkv_fx import Budgets, Policy
from xkv_fx.lowering.program import compile_program, one_row_prompts
from xkv_fx.runtime.many.growing import Growing, GrowingText, Job
from xkv_fx.runtime.many.rows import Rows
from xkv_fx.runtime.session import Session


class Bytes:
    """A tokenizer of bytes; 0 is special."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return bytes(token for token in ids if token).decode("utf-8", "replace")


class Pieces:
    """A tokenizer that puts a space between words, as those of SentencePiece do, but not before the first."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join("abcdefgh"[token] for token in ids)


def job(stop: tuple[str, ...] = (), tokenizer: object = None, most: int = 99) -> Job:
    return Job(0, random_ids(1, 3), most, frozenset(), stop, lambda logits: logits, tokenizer)


def test_characters_of_several_tokens_come_with_the_last() -> None:
    growing, text = GrowingText(Bytes()), "aé€😀b"
    parts = [growing.add(token) for token in [*text.encode(), 0]]
    assert parts == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
    assert growing.text == text


def test_words_keep_their_spaces() -> None:
    growing = GrowingText(Pieces())
    assert [growing.add(token) for token in (3, 0, 3)] == ["d", " a", " d"]


@pytest.mark.parametrize(
    ("text", "stops", "kept", "tokens"),
    [
        ("one two", ("two",), "one ", 7),
        ("one two", ("xx", "e t"), "on", 5),
        ("one two", ("e", "n"), "o", 2),
        ("ab€cd", ("€",), "ab", 5),
        ("aaab", ("ab",), "aa", 4),
    ],
)
def test_stop_strings(text: str, stops: tuple[str, ...], kept: str, tokens: int) -> None:
    growing = Growing(job(stops, Bytes()))
    reasons = [growing.add(token) for token in text.encode()[:tokens]]
    assert reasons == [None] * (tokens - 1) + ["stop"]
    assert growing.answer("stop").text == kept


def test_a_stop_string_that_does_not_end() -> None:
    growing = Growing(job(("abcd",), Bytes(), most=3))
    assert [growing.add(token) for token in b"abc"] == [None, None, "length"]
    assert growing.answer("length").text == "abc"


@pytest.mark.parametrize(
    "budgets",
    [
        Budgets.full(3, 40),
        Budgets((12, 9, 17)),
        Budgets((12, 9, 17), Policy(eviction="scored")),
        Budgets((12, 9, 17), Policy(eviction="append")),
    ],
    ids=["full", "ring", "scored", "append"],
)
def test_rows_decode_what_sessions_of_their_own_do(budgets: Budgets) -> None:
    """Rows come and go while a third is idle for more steps than there is room for."""
    program = compile_program(captured(rows=2), budgets, "eager", 8)
    prompts = one_row_prompts(program, captured(rows=1))
    alone = compile_program(captured(rows=1), budgets, "eager", 8)
    rows = Rows(program)
    for turn in range(8):
        row, ids = turn % 2, random_ids(1, 14 + turn, seed=turn)
        fed, expected = Session(prompts), Session(alone)
        token = int(fed.feed(ids)[0, -1].argmax())
        expected.feed(ids)
        rows.put(row, fed.state)
        for _ in range(7):
            logits = rows.step([token if index == row else None for index in range(2)])
            torch.testing.assert_close(logits[row], expected.step(torch.tensor([[token]]))[0, -1], atol=1e-4, rtol=0)
            token = int(logits[row].argmax())
    assert bool(torch.isfinite(rows.state["k_0"]).all())
