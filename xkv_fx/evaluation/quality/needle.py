"""Needle in a haystack: one fact planted in a long text, asked for at the end."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from xkv_fx.errors import PromptError


@dataclasses.dataclass(frozen=True)
class Needle:
    """A prompt with a planted fact.

    Attributes:
        ids: token ids, int64 `[1, S]`.
        answer: the string that a right answer contains.
    """

    ids: Tensor
    answer: str

    def found_in(self, text: str) -> bool:
        """Whether an answer contains the fact."""
        return self.answer in text


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is planted: `statement` goes on with `answer`, and is asked for by `question`."""

    statement: str = "The keeper of the lighthouse lives in"
    answer: str = "Lisbon"
    question: str = "What city does the keeper of the lighthouse live in?"


def plant_needle(tokenizer: Any, haystack: Tensor, depth: float = 0.5, fact: Fact | None = None) -> Needle:
    """Plant a fact into a text, and end with the question and the start of its answer.

    Args:
        haystack: token ids, int64 `[S]`.
        depth: where the fact stands, 0 at the start and 1 at the end of the text.
        fact: what is planted.

    Raises:
        PromptError: a depth outside 0 to 1.
    """
    if not 0 <= depth <= 1:
        raise PromptError(f"depth is a place between 0 (start) and 1 (end) of the text; got {depth!r}")
    fact = fact or Fact()
    cut = int(len(haystack) * depth)
    text = (
        f"{tokenizer.decode(haystack[:cut])} {fact.statement} {fact.answer}. {tokenizer.decode(haystack[cut:])}"
        f"\n\nQuestion: {fact.question}\nAnswer: {fact.statement}"
    )
    return Needle(torch.tensor([tokenizer(text)["input_ids"]]), fact.answer)
