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


def plant_needle(
    tokenizer: Any, haystack: Tensor, depth: float = 0.5, subject: str = "lighthouse", code: str = "48213"
) -> Needle:
    """Plant "The secret code of the SUBJECT is CODE" into a text and ask for it.

    Args:
        haystack: token ids, int64 `[S]`.
        depth: where the fact stands, 0 at the start and 1 at the end of the text.

    Raises:
        PromptError: a depth outside 0 to 1.
    """
    if not 0 <= depth <= 1:
        raise PromptError(f"depth is a place between 0 (start) and 1 (end) of the text; got {depth!r}")
    cut = int(len(haystack) * depth)
    statement = f"The secret code of the {subject} is"
    text = (
        f"{tokenizer.decode(haystack[:cut])} {statement} {code}. {tokenizer.decode(haystack[cut:])}"
        f"\n\nQuestion: What is the secret code of the {subject}?\nAnswer: {statement}"
    )
    return Needle(torch.tensor([tokenizer(text)["input_ids"]]), code)
