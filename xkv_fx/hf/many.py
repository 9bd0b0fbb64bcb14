"""Requests as users write them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from xkv_fx.errors import PromptError, XkvError, first_line
from xkv_fx.files import is_int
from xkv_fx.hf.prompts import tokenize_one
from xkv_fx.runtime.choose_tokens import token_chooser
from xkv_fx.runtime.many.growing import Job
from xkv_fx.runtime.many.request import Answer, Request, Settings
from xkv_fx.runtime.session import refuse_unknown_tokens


class Asked:
    """What a call of `generate_many` asks, and the requests turned into jobs one by one.

    Args:
        requests: requests, strings or token ids.
        settings: of requests that have none of their own.
        end_tokens: tokens that end an answer.
        tokenizer: of strings and answers, if any.
        vocabulary: token ids are below this.
        device: the model's.

    Raises:
        PromptError: settings or end tokens that no request can have.
    """

    def __init__(
        self,
        requests: Iterable[Any],
        settings: Settings,
        end_tokens: Collection[Any],
        tokenizer: Any,
        vocabulary: int,
        device: torch.device,
    ) -> None:
        if isinstance(requests, str | Request) or not isinstance(requests, Iterable):
            raise PromptError(f"requests must be several, as a list or another iterable; got {type(requests).__name__}")
        if not all(is_int(token) and token >= 0 for token in end_tokens):
            raise PromptError(f"end_tokens must be whole numbers of at least 0; got {sorted(end_tokens, key=str)!r}")
        self._requests = requests
        self._settings = settings
        self._ends = frozenset(int(token) for token in end_tokens)
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._device = device
        self._chooser(settings)

    @property
    def known(self) -> int | None:
        """How many requests there are, if that can be known before they are taken."""
        return len(self._requests) if isinstance(self._requests, Sized) else None

    def prefix(self, prefix: Any) -> Tensor | None:
        """The shared prefix as token ids, int64 `[1, S]`."""
        return None if prefix is None else self._tokens("the prefix", prefix)

    def jobs(self) -> Iterator[Job | Answer]:
        """Each request as a job; or an answer that says what is wrong with it."""
        for index, request in enumerate(self._requests):
            try:
                yield self._job(index, request)
            except XkvError as error:
                yield Answer(index, (), None, "error", error)

    def _job(self, index: int, given: Any) -> Job:
        request = given if isinstance(given, Request) else Request(given)
        settings = self._settings.of_request(request, index)
        choose = self._chooser(settings)
        ids = self._tokens("the prompt", request.prompt)
        return Job(index, ids, settings.max_new_tokens, self._ends, settings.stop, choose, self._tokenizer)

    def _chooser(self, settings: Settings) -> Callable[[Tensor], Tensor]:
        if settings.stop and self._tokenizer is None:
            raise PromptError("stop strings are looked for in the answers' text; pass the model's tokenizer too")
        generator = None
        if settings.do_sample and settings.seed is not None:
            generator = torch.Generator(self._device).manual_seed(settings.seed)
        return token_chooser(settings.do_sample, settings.temperature, settings.top_k, generator, settings.top_p)

    def _tokens(self, name: str, prompt: Any) -> Tensor:
        try:
            ids = tokenize_one(name, prompt, self._tokenizer)
        except XkvError:
            raise
        except Exception as error:  # whatever a tokenizer raises fails this prompt only
            raise PromptError(f"{name} cannot be tokenized: {first_line(error)}") from error
        refuse_unknown_tokens(ids, self._vocabulary, name)
        return ids.to(self._device)


def check_counts(**counts: int | None) -> None:
    """Raise PromptError unless each of these is a whole number of at least 1, or None."""
    for name, count in counts.items():
        if count is not None and (not is_int(count) or count < 1):
            raise PromptError(f"{name} must be a whole number of at least 1; got {count!r}")
