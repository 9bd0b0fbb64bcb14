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


def buffers(name: str) -> list[Tensor]:
    coding = Coding.of(name, DIM)
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
