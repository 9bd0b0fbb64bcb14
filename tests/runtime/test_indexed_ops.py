"""Attention over the keys that an indexer picks, against loops that sort them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import oracles
import pytest
import torch
from torch import Tensor

from xkv_fx.runtime import any_length, attention, indexed_ops, ops
from xkv_fx.runtime.indexing import highest

ROWS, HEADS, KV_HEADS, DIM, INDEX_HEADS, INDEX_DIM, SLOTS, NEW, TOP_K = 2, 4, 2, 6, 5, 3, 7, 9, 4
SCALE = 0.3


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


@pytest.fixture(params=["blocks of 64", "blocks of 4"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "blocks of 4":
        for module in (attention, indexed_ops, any_length):
            monkeypatch.setattr(module, "INDEX_BLOCK", 4)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("op", [ops.attention, any_length.attention])
def test_a_prompt_reaches_what_is_picked(op: Callable[..., Tensor]) -> None:
    q, k, v = random(ROWS, HEADS, NEW, DIM), random(ROWS, KV_HEADS, NEW, DIM), random(ROWS, KV_HEADS, NEW, 5)
    index = random(ROWS, INDEX_HEADS, NEW, INDEX_DIM), random(ROWS, 1, NEW, INDEX_DIM), random(ROWS, NEW, INDEX_HEADS)
    sinks = random(HEADS)
    given = (q, k, v, 0, SCALE, None, 2.0, sinks, None, *index, TOP_K)
    torch.testing.assert_close(op(*given), oracles.attention(*given), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("op", [indexed_ops.extend_indexed, any_length.extend_indexed])
def test_further_tokens_reach_what_is_picked_among_slots_and_themselves(op: Callable[..., Tensor]) -> None:
    q, k, v = random(ROWS, HEADS, NEW, DIM), random(ROWS, KV_HEADS, NEW, DIM), random(ROWS, KV_HEADS, NEW, 5)
    held = (
        random(ROWS, KV_HEADS, SLOTS, DIM),
        random(ROWS, KV_HEADS, SLOTS, 5),
        random(ROWS, KV_HEADS, SLOTS, INDEX_DIM),
    )
    index = random(ROWS, INDEX_HEADS, NEW, INDEX_DIM), random(ROWS, 1, NEW, INDEX_DIM), random(ROWS, NEW, INDEX_HEADS)
    used = torch.tensor([5, 0])
    mask = (torch.arange(SLOTS) < used[:, None])[:, None, None]
    keys = torch.cat((held[2], index[1].expand(-1, KV_HEADS, -1, -1)), 2)

    def reach(row: int, head: int, query: int) -> list[int]:
        reachable = [*range(int(used[row])), *range(SLOTS, SLOTS + query + 1)]
        return oracles.picked(index[0][row, :, query], keys[row, head], index[2][row, query], reachable, TOP_K)

    whole = torch.cat((held[0], k), 2), torch.cat((held[1], v), 2)
    expected, _ = oracles.attend(q, *whole, reach, SCALE)
    got = op(q, k, v, *held[:2], mask, SCALE, *index, held[2], TOP_K)
    torch.testing.assert_close(got, expected.float(), atol=1e-5, rtol=0)


def test_a_token_picks_among_the_valid_slots_its_own_included() -> None:
    index = random(ROWS, INDEX_HEADS, 1, INDEX_DIM), random(ROWS, 1, 1, INDEX_DIM), random(ROWS, 1, INDEX_HEADS)
    cache = random(ROWS, KV_HEADS, SLOTS, INDEX_DIM)
    expected_cache = cache.clone()
    slot = torch.tensor([[6, 1], [0, 2]])  # of each KV head, as under eviction by score
    for row, head in itertools.product(range(ROWS), range(KV_HEADS)):
        expected_cache[row, head, slot[row, head]] = index[1][row, 0, 0]
    valid = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    mask = torch.zeros(ROWS, 1, 1, SLOTS).masked_fill(~valid[:, None, None], float("-inf"))
    got = indexed_ops.pick_slots(*index, cache, slot, mask, TOP_K)
    assert torch.equal(cache, expected_cache)
    assert got.shape == (ROWS, KV_HEADS, 1, SLOTS)
    for row, head in itertools.product(range(ROWS), range(KV_HEADS)):
        reachable = valid[row].nonzero()[:, 0].tolist()
        expected = oracles.picked(index[0][row, :, 0], cache[row, head], index[2][row, 0], reachable, TOP_K)
        assert (got[row, head, 0] == 0).nonzero()[:, 0].tolist() == expected


def test_keys_that_tie_with_the_last_are_picked_too() -> None:
    scores = torch.tensor([[[[3.0, 1.0, 2.0, 1.0, 1.0, 5.0]]]])
    reachable = torch.tensor([True, True, True, True, False, True])
    assert highest(scores, reachable, 4)[0, 0, 0].tolist() == [True, True, True, True, False, True]
    assert highest(scores, reachable, 2)[0, 0, 0].tolist() == [True, False, False, False, False, True]


def test_index_keys_move_with_their_tokens() -> None:
    cache, new = random(ROWS, KV_HEADS, SLOTS, INDEX_DIM), random(ROWS, 1, NEW, INDEX_DIM)
    source = torch.tensor([0, 4, SLOTS, SLOTS + NEW - 1]).expand(ROWS, KV_HEADS, -1)
    both = torch.cat((cache, new.expand(-1, KV_HEADS, -1, -1)), 2)
    expected = torch.cat((both[:, :, source[0, 0]], cache[:, :, 4:]), 2)
    indexed_ops.keep_index(new, source, cache, 4, False)
    assert torch.equal(cache, expected)
