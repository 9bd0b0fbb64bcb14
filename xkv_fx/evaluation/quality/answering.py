"""Reading a prompt into a cache and answering greedily: for every kind of cache the same few calls."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import Tensor

from xkv_fx.hf.cache_name import CACHE_NAME


class Reader(Protocol):
    """A model with a cache that holds one conversation."""

    def read(self, ids: Tensor) -> Tensor:
        """Take a prompt or a turn, int64 `[1, S]`; logits `[1, vocabulary]` after its last token."""
        ...

    def step(self, token: Tensor) -> Tensor:
        """Take one decoded token, int64 `[1, 1]`; logits `[1, vocabulary]`."""
        ...

    @property
    def kv_bytes(self) -> int:
        """Bytes that keys and values take now."""
        ...


class BudgetedReader:
    """A transformed model and one session of it."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.session = llm.new_session()

    def start_again(self) -> None:
        self.session.reset()

    def read(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.llm(ids, past_key_values=self.session, logits_to_keep=1).logits
        return logits[:, -1]

    def step(self, token: Tensor) -> Tensor:
        logits: Tensor = self.llm(token, past_key_values=self.session, decoding=True).logits
        return logits[:, -1]

    @property
    def kv_bytes(self) -> int:
        return int(self.session.kv_bytes)


class TransformersReader:
    """A transformers model with a cache of transformers' own.

    Args:
        new_cache: makes an empty one.
        cache_bytes: counts the bytes that one takes.
    """

    def __init__(self, model: Any, new_cache: Callable[[], Any], cache_bytes: Callable[[Any], int]) -> None:
        self.model = model
        self.new_cache = new_cache
        self.cache_bytes = cache_bytes
        self.cache = new_cache()

    def start_again(self) -> None:
        self.cache = self.new_cache()

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        output = self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: self.cache})
        logits: Tensor = output.logits
        return logits[:, -1]

    def step(self, token: Tensor) -> Tensor:
        return self.read(token)

    @property
    def kv_bytes(self) -> int:
        return self.cache_bytes(self.cache)


def answer(reader: Reader, logits: Tensor, new_tokens: int, ends: Collection[int]) -> list[int]:
    """Greedy tokens from the logits of a prompt on, until one of those that end an answer; that one is left out."""
    tokens: list[int] = []
    while True:
        token = logits.argmax(-1, keepdim=True)
        if int(token) in ends:
            return tokens
        tokens.append(int(token))
        if len(tokens) == new_tokens:
            return tokens
        logits = reader.step(token)


def forced(reader: Reader, logits: Tensor, continuation: Tensor) -> Tensor:
    """Logits `[T, vocabulary]` for each token of a given continuation, decoded one by one from a prompt's logits on.

    Args:
        continuation: int64 `[1, T]`.
    """
    steps = [reader.step(token) for token in torch.split(continuation[:, :-1], 1, dim=1)]
    return torch.cat((logits, *steps))


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end an answer, by the model's generation configuration."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list | tuple) else (ends,))
