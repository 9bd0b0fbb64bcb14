"""Values that are the keys are stored once: an op does with an empty `v_cache` what it does with a copy of the keys."""

from __future__ import annotations

from collections.abc import Callable

import oracles
import pytest
import torch
from by_policy import keep_by, scored_by
from torch import Tensor

from xkv_fx.runtime import any_length, ops

ROWS, HEADS, DIM, SLOTS, NEW = 2, 4, 6, 5, 3
SCALE = 0.3


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def decode(op: Callable[..., Tensor], k_cache: Tensor, v_cache: Tensor) -> Tensor:
    q, k = random(ROWS, HEADS, 1, DIM), random(ROWS, 1, 1, DIM)
    mask = torch.zeros(ROWS, 1, 1, SLOTS).masked_fill_(torch.arange(SLOTS) > 3, float("-inf"))
    return op(q, k, k, k_cache, v_cache, torch.tensor([1, 3]), mask, SCALE)


def decode_capped(op: Callable[..., Tensor], k_cache: Tensor, v_cache: Tensor) -> Tensor:
    q, k = random(ROWS, HEADS, 1, DIM), random(ROWS, 1, 1, DIM)
    return op(q, k, k, k_cache, v_cache, torch.tensor([1, 3]), torch.zeros(ROWS, 1, 1, SLOTS), SCALE, softcap=2.0)


def decode_scored(op: Callable[..., Tensor], k_cache: Tensor, v_cache: Tensor) -> Tensor:
    q, k = random(ROWS, HEADS, 1, DIM), random(ROWS, 1, 1, DIM)
    positions, scores = torch.arange(SLOTS, dtype=torch.int32).repeat(ROWS, 1, 1), random(ROWS, 1, SLOTS)
    return op(q, k, k, k_cache, v_cache, positions, scores, torch.tensor([7, 2]), SCALE, 2, 1)


def extend(op: Callable[..., Tensor], k_cache: Tensor, v_cache: Tensor) -> Tensor:
    q, k = random(ROWS, HEADS, NEW, DIM), random(ROWS, 1, NEW, DIM)
    return op(q, k, k, k_cache, v_cache, torch.arange(SLOTS).expand(ROWS, 1, 1, -1) < 4, SCALE)


def keep(op: Callable[..., Tensor], k_cache: Tensor, v_cache: Tensor) -> Tensor:
    k, positions = random(ROWS, 1, NEW, DIM), torch.arange(SLOTS, dtype=torch.int32).repeat(ROWS, 1, 1)
    seen, length = torch.tensor([SLOTS, 2]), torch.tensor([NEW, NEW])
    scores, plan = random(ROWS, 1, SLOTS + NEW), (SLOTS, 2, 1, 0, None, False)
    return op(k, k, scores, length, seen, seen, k_cache, v_cache, positions, *plan)


CASES = [
    (decode, ops.decode_attention, oracles.decode_attention),
    (decode_capped, ops.decode_attention, oracles.decode_attention),
    (decode_scored, scored_by(ops.decode_scored), oracles.decode_scored),
    (extend, ops.extend_attention, oracles.extend_attention),
    (extend, any_length.extend_attention, oracles.extend_attention),
    (keep, keep_by(ops.keep), oracles.keep),
]


@pytest.mark.parametrize(("run", "op", "oracle"), CASES)
def test_an_empty_v_cache_stands_for_the_keys(
    run: Callable[..., Tensor], op: Callable[..., Tensor], oracle: Callable[..., Tensor]
) -> None:
    results = []
    for function, shared in ((op, True), (op, False), (oracle, True)):
        k_cache = random(ROWS, 1, SLOTS, DIM)
        v_cache = torch.empty(ROWS, 1, SLOTS, 0) if shared else k_cache.clone()
        out = run(function, k_cache, v_cache)
        assert shared or torch.equal(v_cache, k_cache)
        results.append((out, k_cache))
    for out, k_cache in results[1:]:
        torch.testing.assert_close(out, results[0][0])
        torch.testing.assert_close(k_cache, results[0][1])
