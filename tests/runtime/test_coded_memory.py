"""A dequantized copy of a cache never exists: no tensor of floats that decode, extend or keep make is half as large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime_inputs import random_qkv
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xkv_fx.runtime.coded import Stored, extend
from xkv_fx.runtime.coded_ops import CODED_DECOMPOSITIONS
from xkv_fx.runtime.form import AttentionForm
from xkv_fx.runtime.quantize import Coding
from xkv_fx.runtime.scorers.base import make_scorer, scorer_names
from xkv_fx.runtime.scorers.prompt import PromptView

KV_HEADS, SLOTS, DIM, TOKENS = 2, 2000, 16, 3
WHOLE = KV_HEADS * SLOTS * DIM


class LargestFloats(TorchDispatchMode):
    """How many numbers the largest tensor of floats has that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.is_floating_point():
                self.numel = max(self.numel, made.numel())
        return out


def buffers(name: str, dim: int = DIM) -> list[Tensor]:
    coding = Coding.of(name, dim)
    codes = torch.zeros(1, KV_HEADS, SLOTS, coding.code_bytes, dtype=torch.uint8)
    return [codes, torch.zeros(1, KV_HEADS, SLOTS, coding.groups, coding.numbers, dtype=torch.float16)]


def decode(held: list[Tensor], bits: int) -> None:
    q, k, v = random_qkv((4, KV_HEADS), 1, (DIM, DIM), 1)
    mask = torch.zeros(1, 1, 1, SLOTS)
    op = torch.ops.xkv.decode_coded.default
    CODED_DECOMPOSITIONS[op](q, k, v, *held, torch.tensor([5]), mask, 0.3, bits, bits)


def decode_scored(held: list[Tensor], bits: int) -> None:
    q, k, v = random_qkv((4, KV_HEADS), 1, (DIM, DIM), 1)
    positions = torch.zeros(1, KV_HEADS, SLOTS, dtype=torch.int32)
    scores, slot = torch.zeros(1, KV_HEADS, SLOTS), torch.tensor([[5, 6]])
    mask, seen = torch.zeros(1, 1, 1, SLOTS), torch.tensor([7])
    op = torch.ops.xkv.decode_coded_scored.default
    CODED_DECOMPOSITIONS[op](q, k, v, *held, positions, scores, slot, mask, seen, 0.3, bits, bits)


def extend_slots(held: list[Tensor], bits: int) -> None:
    q, k, v = random_qkv((4, KV_HEADS), TOKENS, (DIM, DIM), 1)
    keys, values = Stored.pair(held, (bits, bits), (DIM, DIM))
    extend(q, k, v, keys, values, torch.ones(1, 1, 1, SLOTS, dtype=torch.bool), AttentionForm(0.3))


def keep(held: list[Tensor], bits: int) -> None:
    _, k, v = random_qkv((4, KV_HEADS), TOKENS, (DIM, DIM), 1)
    source = torch.arange(TOKENS, SLOTS + TOKENS).expand(1, KV_HEADS, SLOTS)
    positions = torch.zeros(1, KV_HEADS, SLOTS, dtype=torch.int32)
    op = torch.ops.xkv.keep_coded.default
    CODED_DECOMPOSITIONS[op](k, v, source, source.int(), *held, positions, SLOTS, bits, bits, fresh=False)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("does", [decode, decode_scored, extend_slots, keep])
def test_no_copy_of_a_cache_in_floats(does: Callable[[list[Tensor], int], None], name: str) -> None:
    held = [*buffers(name), *buffers(name)]
    with LargestFloats() as largest:
        does(held, Coding.of(name, DIM).bits)
    assert 0 < largest.numel <= WHOLE // 2


@pytest.mark.parametrize("scorer", scorer_names())
def test_scorers_widen_some_slots_at_a_time(scorer: str) -> None:
    """Also before they choose among what slots hold and what is new."""
    dim = 4 * DIM  # of which the weights of a few queries are a small part
    bits = Coding.of("int4", dim).bits
    keys, values = Stored.pair([*buffers("int4", dim), *buffers("int4", dim)], (bits, bits), (dim, dim))
    q, k, v = random_qkv((4, KV_HEADS), TOKENS, (dim, dim), 1)
    ordinals = torch.arange(SLOTS).expand(1, KV_HEADS, -1)
    length, seen = torch.tensor([TOKENS]), torch.tensor([SLOTS])
    prompt = PromptView(q, k, v, length, AttentionForm(0.3), seen, keys, values, ordinals, q, old_scores=None)
    with LargestFloats() as largest:
        scores = make_scorer(scorer, {})(prompt)
    assert scores.shape == (1, KV_HEADS, SLOTS + TOKENS)
    assert largest.numel <= 4 * WHOLE // 2
