"""What is asked of a model many times over, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from xkv_fx.errors import PromptError, XkvError
from xkv_fx.files import is_int

Reason = Literal["end", "stop", "length", "cancelled", "error"]
"""Why an answer ended: an end token, a stop string, its number of tokens, the caller, or what was wrong with it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One of the requests of `llm.generate_many`. What is None is as the call says.

    Attributes:
        prompt: a string, or token ids of shape `[S]` or `[1, S]`.
        max_new_tokens: how many tokens are generated at most.
        stop: strings that end the answer; they are not part of its text.
        do_sample: draw from the distribution instead of taking the likeliest token.
        temperature, top_k, top_p: of that distribution.
        seed: of the random numbers.
    """

    prompt: Any
    max_new_tokens: int | None = None
    stop: str | Sequence[str] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        index: which request it was, counted from 0.
        ids: the tokens that were generated, an end token included.
        text: these as text, up to a stop string; None without a tokenizer.
        reason: why it ended: `"end"` (an end token), `"stop"` (a stop string), `"length"`, `"cancelled"`, or `"error"`.
        error: what was wrong with the request, where the reason is `"error"`.
        prompt_tokens: tokens of the prompt.
        shared_tokens: how many of them were not fed again, since the prompt begins with the shared prefix.
    """

    index: int
    ids: tuple[int, ...]
    text: str | None
    reason: Reason
    error: XkvError | None = None
    prompt_tokens: int = 0
    shared_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an answer is generated; the attributes are those of `Request`, `stop` as a tuple."""

    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise PromptError(f"max_new_tokens must be a whole number of at least 1; got {self.max_new_tokens!r}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise PromptError(f"stop must be strings of at least one character; got {self.stop!r}")
        if self.seed is not None and not is_int(self.seed):
            raise PromptError(f"a seed must be a whole number; got {self.seed!r}")

    @classmethod
    def of(cls, stop: str | Sequence[str], **options: Any) -> Settings:
        """With one stop string, or several."""
        return cls(stop=_stops(stop), **options)

    def of_request(self, request: Request, index: int) -> Settings:
        """What a request says, and these settings where it says nothing: random numbers then follow from the seed and
        from which request it is.

        Raises:
            PromptError: a value out of its range.
        """
        names = [field.name for field in dataclasses.fields(self)]
        said = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
        if "stop" in said:
            said["stop"] = _stops(said["stop"])
        if self.seed is not None:
            said = {"seed": self.seed + index, **said}
        return dataclasses.replace(self, **said)


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(stop, str):
        return (stop,)
    if not isinstance(stop, Sequence):
        raise PromptError(f"stop must be a string or several; got {stop!r}")
    return tuple(stop)
