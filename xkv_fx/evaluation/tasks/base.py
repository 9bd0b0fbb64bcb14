"""What a task is: something to read, a question about it, and the strings that a right answer contains."""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from xkv_fx.errors import PromptError
from xkv_fx.evaluation.texts import documentation
from xkv_fx.files import is_int

# How often a haystack that holds an answer by chance is drawn again.
_DRAWS = 100
# The least that an answer may be buried in, tokens.
LEAST_HAYSTACK = 32


@dataclasses.dataclass(frozen=True)
class Instance:
    """One example of a task. The prompt is the context followed by the question.

    Attributes:
        context: what is read, int64 `[1, C]`.
        question: what is asked, and the first words of the answer, int64 `[1, Q]`.
        answers: strings that a right answer contains, all of them.
        new_tokens: how many tokens may be generated.
    """

    context: Tensor
    question: Tensor
    answers: tuple[str, ...]
    new_tokens: int

    @property
    def prompt(self) -> Tensor:
        """int64 `[1, C + Q]`."""
        return torch.cat((self.context, self.question), 1)

    def score(self, text: str) -> float:
        """The share of the answers that a generated text contains, without regard to case (RULER's string match)."""
        lowered = text.lower()
        return sum(answer.lower() in lowered for answer in self.answers) / len(self.answers)


class Encoder:
    """A tokenizer that encodes one piece of a text after another, so that the number of tokens is exact."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._encode = functools.cache(self._encoded)
        start = getattr(tokenizer, "bos_token_id", None)
        first = tokenizer("a")["input_ids"][:1]
        self.start: tuple[int, ...] = (start,) if start is not None and list(first) == [start] else ()

    def __call__(self, text: str) -> tuple[int, ...]:
        """Token ids, without those that start or end a prompt."""
        return self._encode(text)

    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a task draws for one example; `bury` and `instance` put it together.

    Attributes:
        needles: sentences that are planted, in their order.
        question: what is asked.
        answers: what a right answer contains.
        absent: strings that the rest of the text may not contain, besides the answers.
    """

    needles: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    absent: tuple[str, ...] = ()


class Task(Protocol):
    """Makes examples; see `register_task`."""

    def __call__(self, encoder: Encoder, rng: np.random.Generator, length: int) -> Instance: ...


_tasks: dict[str, Task] = {}
T = TypeVar("T", bound=Callable[..., Instance])


def register_task(name: str) -> Callable[[T], T]:
    """Function decorator: make a task known by name.

    The function is called as `task(encoder, rng, length)` and returns an `Instance` of exactly `length` tokens.

    Raises:
        PromptError: the name is taken.
    """

    def register(function: T) -> T:
        if name in _tasks:
            raise PromptError(f"a task named {name!r} is registered already; choose another name")
        _tasks[name] = function
        return function

    return register


def task_names() -> tuple[str, ...]:
    """The names of the registered tasks."""
    return tuple(_tasks)


def check_task(name: str) -> None:
    """Raises:
    PromptError: no such task.
    """
    if name not in _tasks:
        raise PromptError(f"unknown task {name!r}; choose from {', '.join(task_names())}")


def make_instances(name: str, tokenizer: Any, length: int, count: int, seed: int = 0) -> tuple[Instance, ...]:
    """Examples of a task. Each depends on seed and place alone, so that more of them begin with the same ones.

    Args:
        name: of a registered task.
        tokenizer: the model's.
        length: tokens of context and question together, exact.
        count: how many.
        seed: of everything that is drawn.

    Raises:
        PromptError: an unknown task, a length that is too short for it, or a count below 1.
    """
    check_task(name)
    for what, value, least in (("length", length, 1), ("count", count, 1), ("seed", seed, 0)):
        if not is_int(value) or value < least:
            raise PromptError(f"{what} must be a whole number of at least {least}; got {value!r}")
    encoder = tokenizer if isinstance(tokenizer, Encoder) else Encoder(tokenizer)
    made = []
    for place in range(count):
        rng = np.random.default_rng((seed, zlib.crc32(name.encode()), place))
        try:
            instance = _tasks[name](encoder, rng, length)
        except PromptError as error:
            raise PromptError(f"task {name!r}: {error}") from error
        if instance.prompt.shape != (1, length):
            raise PromptError(f"task {name!r} made a prompt of {instance.prompt.shape[1]} tokens instead of {length}")
        made.append(instance)
    return tuple(made)


def instance(encoder: Encoder, context: Sequence[int], question: Sequence[int], answers: tuple[str, ...]) -> Instance:
    """An example whose answer has room for half as much again as the answers take."""
    told = len(encoder(" " + ", ".join(answers) + "."))
    return Instance(
        torch.tensor([context]), torch.tensor([question]), answers, new_tokens=told + told // 2 + 4
    )  # the answers and a few words


def bury(encoder: Encoder, rng: np.random.Generator, length: int, opening: str, drawn: Drawn) -> Instance:
    """Plant sentences at random places of a text, in their order, so that the prompt has exactly `length` tokens.

    Raises:
        PromptError: too short a length.
    """
    start = (*encoder.start, *encoder(opening))
    question = encoder(drawn.question)
    needles = [encoder(" " + needle) for needle in drawn.needles]
    fixed = len(start) + len(question) + sum(map(len, needles))
    if length < fixed + LEAST_HAYSTACK:
        raise PromptError(f"{length} tokens are too few; it needs at least {fixed + LEAST_HAYSTACK}")
    hay = _haystack(encoder, rng, length - fixed, (*drawn.answers, *drawn.absent))
    places = np.sort(rng.integers(len(hay), size=len(needles))).tolist()  # before the last, which may be cut off
    context = list(start)
    for place, sentence in enumerate(hay):
        for needle, at in zip(needles, places, strict=True):
            context += needle if at == place else ()
        context += sentence
    return instance(encoder, context, question, drawn.answers)


def _haystack(encoder: Encoder, rng: np.random.Generator, tokens: int, absent: Sequence[str]) -> list[tuple[int, ...]]:
    """Sentences of exactly so many tokens together, the last one cut off, none of which contains what must not be."""
    every = sentences()
    lowered = [part.lower() for part in absent]
    for _ in range(_DRAWS):
        found, left, place = [], tokens, int(rng.integers(len(every)))
        clean = True
        while left > 0 and clean:
            text = every[place % len(every)]
            clean = not any(part in text.lower() for part in lowered)
            ids = encoder(" " + text)[:left]
            found.append(ids)
            left -= len(ids)
            place += 1
        if clean:
            return found
    raise PromptError(f"no stretch of {tokens} tokens of the documentation is free of {', '.join(absent)}")


@functools.cache
def sentences() -> tuple[str, ...]:
    """Whole sentences of the documentation, of 30 to 400 characters, in their order."""
    parts = re.split(r"(?<=[.!?])\s+", documentation())
    flat = (" ".join(part.split()) for part in parts)
    return tuple(part for part in flat if re.fullmatch(r"[A-Z][^*|=+]{28,398}[.!?]", part))
