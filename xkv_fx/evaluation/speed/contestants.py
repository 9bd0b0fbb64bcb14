"""Who takes part in the bench: a model with its cache, which can prefill, be filled directly, and decode a token.

All of them decode greedily, one token a row, and choose it themselves: a step is all that lies between two tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from xkv_fx.evaluation.quality.quantized import cache_bytes
from xkv_fx.evaluation.quality.quantized import quantized as quantized_kind
from xkv_fx.hf.cache import SessionCache
from xkv_fx.hf.cache_name import CACHE_NAME
from xkv_fx.hf.generation import BudgetedLM


class Contestant(Protocol):
    """One way of running a model."""

    name: str
    rows: int
    model: PreTrainedModel

    @property
    def kv_bytes(self) -> int:
        """Bytes of K/V held after `fill` or `prefill`."""
        ...

    def prefill(self, ids: Tensor) -> None:
        """Start anew with a prompt, int64 `[rows, S]`."""
        ...

    def fill(self, tokens: int) -> None:
        """Start anew as if so many tokens a row had been seen; what is kept of them are random numbers."""
        ...

    def step(self) -> None:
        """Decode one token a row."""
        ...


class Ours:
    """A transformed model, beside what it was made from."""

    def __init__(self, name: str, model: PreTrainedModel, llm: BudgetedLM) -> None:
        self.name, self.model, self.llm = name, model, llm
        self.rows = llm.program.plan.rows
        self.session: SessionCache = llm.new_session()
        self._ids = torch.full((self.rows, 1), 5, device=llm.device)

    @property
    def kv_bytes(self) -> int:
        return self.session.kv_bytes

    def prefill(self, ids: Tensor) -> None:
        self.session.reset()
        self._ids = self.session.feed(ids, None, None, all_logits=False).argmax(-1)

    def fill(self, tokens: int) -> None:
        fill_session(self.session, tokens)

    def step(self) -> None:
        self._ids = self.session.step(self._ids, None).argmax(-1)


class Transformers:
    """A transformers model and one of transformers' caches, eager or compiled."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        rows: int,
        new_cache: Callable[[], Cache],
        kv_bytes: Callable[[Cache], int],
        compiled: bool = False,
    ) -> None:
        self.name, self.model, self.rows = name, model, rows
        self._new_cache, self._kv_bytes = new_cache, kv_bytes
        self._cache = new_cache()
        self._decode: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model
        self._ids = torch.full((rows, 1), 5, device=model.device)
        self._seen = 0

    @property
    def kv_bytes(self) -> int:
        return self._kv_bytes(self._cache)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> None:
        self._restart()
        logits = self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: self._cache}).logits
        self._ids, self._seen = logits.argmax(-1), ids.shape[1]

    @torch.no_grad()
    def fill(self, tokens: int) -> None:
        self._restart()
        config: Any = self.model.config
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = (self.rows, getattr(config, "num_key_value_heads", None) or heads, tokens, size)
        for layer in range(config.num_hidden_layers):
            k, v = (torch.randn(shape, device=self.model.device).to(self.model.dtype) for _ in "kv")
            self._cache.update(k, v, layer)
        self._seen = tokens

    @torch.no_grad()
    def step(self) -> None:
        position = torch.full_like(self._ids, self._seen)
        logits = self._decode(self._ids, position_ids=position, use_cache=True, **{CACHE_NAME: self._cache}).logits
        self._ids = logits.argmax(-1)
        self._seen += 1

    def _restart(self) -> None:
        """A compiled cache stays where it is, since another one would be compiled for again."""
        if isinstance(self._cache, StaticCache):
            self._cache.reset()
        else:
            self._cache = self._new_cache()


def dynamic(model: PreTrainedModel, rows: int) -> Transformers:
    """transformers' default: eager, a cache that grows."""
    return Transformers("dynamic", model, rows, lambda: DynamicCache(config=model.config), _held)


def static(model: PreTrainedModel, rows: int, slots: int, name: str = "static") -> Transformers:
    """transformers' static cache of so many slots, and `torch.compile`."""
    return Transformers(
        name, model, rows, lambda: StaticCache(config=model.config, max_cache_len=slots), _held, compiled=True
    )


def sliding(model: PreTrainedModel, rows: int, slots: int) -> Transformers:
    """A sliding window of so many tokens in every layer: transformers' own way to bound a cache."""
    layers: int = model.config.num_hidden_layers

    def new() -> Cache:
        return Cache(layers=[DynamicSlidingWindowLayer(sliding_window=slots) for _ in range(layers)])

    return Transformers("sliding", model, rows, new, _held)


def quantized(name: str, model: PreTrainedModel, rows: int) -> Transformers:
    """One of transformers' quantized caches, by its name in `xkv_fx.evaluation.quality.quantized.QUANTIZED`."""
    kind = quantized_kind(name)
    return Transformers(name, model, rows, lambda: kind.new_cache(model.config), cache_bytes)


# The codes below are numbers in every format; as a float of 8 bits, the next one is none.
_CODES = 127


def fill_session(session: SessionCache, tokens: int) -> None:
    """Make a session what it would be behind a prompt of so many tokens a row, keys and values being random."""
    inner = session.session
    generator = torch.Generator(inner.program.plan.device).manual_seed(0)
    inner.state.reset()
    for buffer, tensor in zip(inner.state.buffers, inner.state.tensors, strict=True):
        if buffer.holds != "kv":
            continue
        if buffer.dtype == torch.uint8:
            tensor.random_(0, _CODES, generator=generator)
        else:
            tensor.normal_(generator=generator)
    for count in inner.counts.values():
        count.fill_(tokens)
    inner.restore(inner.state, tokens)  # its own content: what it counts follows from that


def _held(cache: Any) -> int:
    return sum(
        tensor.untyped_storage().nbytes() if hasattr(layer, "max_cache_len") else tensor.nbytes
        for layer in cache.layers
        if layer.is_initialized
        for tensor in (layer.keys, layer.values)
    )
