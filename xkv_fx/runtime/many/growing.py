"""An answer while it grows, token by token."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from xkv_fx.runtime.choose_tokens import Choose
from xkv_fx.runtime.many.request import Answer, Reason

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A request whose prompt is tokens and whose settings are known.

    Attributes:
        index: which request it is.
        ids: the prompt, int64 `[1, S]`, on the model's device.
        max_new_tokens: how many tokens are generated at most, at least 1.
        end_tokens: tokens that end it.
        stop: strings that end it; with a tokenizer only.
        choose: takes its tokens from logits.
        tokenizer: decodes it; None where nobody asks for text.
    """

    index: int
    ids: Tensor
    max_new_tokens: int
    end_tokens: frozenset[int]
    stop: tuple[str, ...]
    choose: Choose
    tokenizer: Any = None


class GrowingText:
    """The text of tokens that come one by one. Each is decoded with those just before it, not with all before it.

    Attributes:
        text: what is settled so far: a character of several tokens comes with its last.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._settled = 0

    def add(self, token: int) -> str:
        """What the token adds to the text."""
        self._ids.append(token)
        before = decoded(self._tokenizer, self._ids[self._start : self._settled])
        now = decoded(self._tokenizer, self._ids[self._start :])
        if len(now) <= len(before) or now.endswith(_UNFINISHED):
            return ""
        self._start, self._settled = self._settled, len(self._ids)
        return self._grow(now[len(before) :])

    def rest(self) -> str:
        """What is left at the end: characters that were never finished."""
        before = decoded(self._tokenizer, self._ids[self._start : self._settled])
        now = decoded(self._tokenizer, self._ids[self._start :])
        self._start = self._settled = len(self._ids)
        return self._grow(now[len(before) :])

    def _grow(self, new: str) -> str:
        self.text += new
        return new


class Growing:
    """An answer and what it still waits for.

    Attributes:
        job: what it answers.
        ids: its tokens so far.
        shared: tokens of its prompt that were taken from a shared prefix.
    """

    def __init__(self, job: Job, shared: int = 0) -> None:
        self.job = job
        self.shared = shared
        self.ids: list[int] = []
        self._growing = GrowingText(job.tokenizer) if job.stop else None
        self._stopped: str | None = None  # the text up to a stop string

    def add(self, token: int) -> Reason | None:
        """Add a token; returns why the answer ends with it, None if it does not."""
        self.ids.append(token)
        if token in self.job.end_tokens:
            return "end"
        if self._growing is not None:
            self._stopped = text_up_to(self._growing, token, self.job.stop)
            if self._stopped is not None:
                return "stop"
        return "length" if len(self.ids) == self.job.max_new_tokens else None

    def answer(self, reason: Reason) -> Answer:
        """The answer as it ends."""
        job, text = self.job, self._stopped
        if text is None and job.tokenizer is not None:
            text = decoded(job.tokenizer, self.ids)
        return Answer(job.index, tuple(self.ids), text, reason, None, job.ids.shape[1], self.shared)


def text_up_to(growing: GrowingText, token: int, stops: tuple[str, ...]) -> str | None:
    """Add a token; the text up to the first of the stop strings, if one ends in what the token adds, or None."""
    known = len(growing.text)
    growing.add(token)
    places = [growing.text.find(stop, max(0, known - len(stop) + 1)) for stop in stops]
    first = min((place for place in places if place >= 0), default=None)
    return None if first is None else growing.text[:first]


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of tokens, without special ones."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text
