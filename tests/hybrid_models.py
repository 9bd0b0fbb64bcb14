"""Tiny hybrids with random weights: layers that mix tokens by a state of fixed size beside layers that attend."""

from __future__ import annotations

import functools
from typing import Any

import torch
from ready_models import FULL
from tiny_models import random_ids
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from xkv_fx import Budgets
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.evaluation.coverage.tiny import registered, tiny_model
from xkv_fx.hf.cache import SessionCache
from xkv_fx.hf.cache_name import CACHE_NAME
from xkv_fx.hf.capture import capture
from xkv_fx.hf.generation import BudgetedLM
from xkv_fx.lowering.program import compile_program

_TWO = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "lfm2_moe": {},  # short convolutions
    "qwen3_next": _TWO,  # gated delta rule, in chunks of 64
    "nemotron_h": {},  # Mamba 2; layers of experts alone, which keep nothing
    "falcon_h1": {},  # Mamba 2 and attention in each layer
    "jamba": {},  # Mamba 1, whose code takes further tokens one by one
    "zaya": {},  # a convolution that makes queries, keys and values
}
"""Each keeps its states in another way."""
_OTHERS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": _TWO,
    "jamba_last": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 0},  # no attention at the end
}
_ENTRIES = {entry.model_type: entry for entry in registered()}


@functools.cache
def model(family: str) -> PreTrainedModel:
    options = {**FAMILIES, **_OTHERS}[family]
    return tiny_model(_ENTRIES[family.removesuffix("_last")], **options)


@functools.cache
def captured(family: str, rows: int = 1) -> CapturedModel:
    return capture(model(family), rows=rows, check=rows == 1)


@functools.cache
def transformed(
    family: str, budgets: Budgets | None = None, rows: int = 1, max_new_tokens: int = 0, backend: str = "eager"
) -> BudgetedLM:
    """As `xkv_fx.transform` makes it, but captured only once; full budgets when None."""
    source, own = captured(family, rows), model(family)
    budgets = Budgets.full(len(source.layers), FULL) if budgets is None else budgets
    program = compile_program(source, budgets, backend, max_new_tokens)
    return BudgetedLM(own.config, own.generation_config, budgets, program)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """int64 `[rows, length]`, none of them padding."""
    return random_ids(rows, length, seed=seed)


def logits_of(family: str, ids: Tensor) -> Tensor:
    """Those of the model itself, without a cache."""
    with torch.no_grad():
        logits: Tensor = model(family)(ids, use_cache=False).logits
    return logits


def feed(llm: BudgetedLM, session: SessionCache, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """The logits of all of a prompt's or a turn's tokens."""
    given: dict[str, Any] = {CACHE_NAME: session}
    logits: Tensor = llm(ids, attention_mask=valid, **given).logits
    return logits


def step(llm: BudgetedLM, session: SessionCache, ids: Tensor) -> Tensor:
    """The logits of one decoded token a row, `[rows, 1]`."""
    given: dict[str, Any] = {CACHE_NAME: session}
    logits: Tensor = llm(ids, decoding=True, **given).logits
    return logits


class ForgettingModel:
    """The oracle of tight budgets: transformers itself, with all but the kept tokens taken out of its attention layers'
    caches before each call, and positions given. What its other layers keep stays as it is."""

    def __init__(self, family: str, prompt: Tensor) -> None:
        self.model = model(family)
        self.one_by_one = not all(layer.goes_on for layer in captured(family).recurrences)
        self.cache: Any = DynamicCache(config=self.model.config)
        self.seen = 0
        self._all: dict[int, tuple[Tensor, Tensor]] = {}
        self.feed(prompt, None)

    def feed(self, ids: Tensor, kept: list[list[list[int]]] | None) -> Tensor:
        """Logits of new tokens that reach the kept ones and each other.

        Args:
            kept: of each attention and KV head, the ordinals of the tokens that it holds; all for None.
        """
        if kept is not None:
            for (index, held), of_layer in zip(self._all.items(), kept, strict=True):
                layer = self.cache.layers[index]
                layer.keys, layer.values = (_picked(part, of_layer) for part in held)
        if self.one_by_one and self.seen:
            return torch.cat([self._run(ids[:, place : place + 1]) for place in range(ids.shape[1])], 1)
        return self._run(ids)

    def _run(self, ids: Tensor) -> Tensor:
        positions = torch.arange(self.seen, self.seen + ids.shape[1])[None]
        given = {CACHE_NAME: self.cache}
        with torch.no_grad():
            logits: Tensor = self.model(ids, position_ids=positions, use_cache=True, **given).logits
        self.seen += ids.shape[1]
        for index, layer in enumerate(self.cache.layers):
            if getattr(layer, "keys", None) is not None:
                new = (part[:, :, -ids.shape[1] :] for part in (layer.keys, layer.values))
                before = self._all.get(index, (layer.keys[:, :, :0], layer.values[:, :, :0]))
                self._all[index] = tuple(torch.cat(pair, 2) for pair in zip(before, new, strict=True))  # type: ignore[assignment]
        return logits


def _picked(part: Tensor, kept: list[list[int]]) -> Tensor:
    return torch.stack([part[0, head, places] for head, places in enumerate(kept)])[None]


def kept_by(session: SessionCache) -> list[list[list[int]]]:
    """What a session of one row says that its attentions keep."""
    return [
        [sorted(token for token in head if token >= 0) for head in session.kept_positions(layer)[0].tolist()]
        for layer in range(len(session))
    ]
