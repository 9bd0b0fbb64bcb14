"""Whole models through any conversation: what stands in a batch beside a row, and on which side it is padded, is no
matter to it; while everything fits nothing differs from transformers; and memory is what was planned, throughout."""

from __future__ import annotations

import functools

import torch
from batches import padded
from fuzzing import TIMES, examples
from hypothesis import given
from hypothesis import strategies as st
from ready_models import model, transform_again
from tiny_models import random_ids
from torch import Tensor

from xkv_fx import Budgets, Policy
from xkv_fx.hf.cache import SessionCache
from xkv_fx.hf.generation import BudgetedLM

ROOM = 12
PLANS = [
    ("llama", Budgets((9, 16), Policy(eviction="scored", scorer="h2o", recent=3, sinks=1))),
    ("llama", Budgets((12, 7), Policy())),
    ("llama", Budgets((12, 12), Policy(eviction="append", sinks=2))),
    ("gemma2", Budgets((5, 12), Policy(eviction="append"))),
    ("gemma2", Budgets((6, 9), Policy(scorer="tova", eviction="scored"))),
    ("gemma3", Budgets((30, 11), Policy(scorer="key_diff"))),
    ("gpt_oss", Budgets((7, 12), Policy(scorer="snapkv", scorer_options={"kernel": 3}))),
    ("qwen3", Budgets((10, 6), Policy(scorer="key_norm", recent=2))),
    ("mistral", Budgets((6, 30), Policy(scorer="streaming", sinks=4))),
]
if TIMES == 1:
    del PLANS[1:]  # each takes seconds to transform

prepared = functools.cache(
    lambda place: transform_again(PLANS[place][1], rows=2, family=PLANS[place][0], max_new_tokens=ROOM)
)


def feed(llm: BudgetedLM, session: SessionCache, rows: list[Tensor], side: str, width: int, fill: int) -> Tensor:
    """Logits `[rows, vocabulary]` of each row's last token."""
    ids, valid = padded(rows, side, fill, width)
    logits: Tensor = session.feed(ids, None, valid, False)
    return logits[:, -1]


@given(place=st.integers(0, len(PLANS) - 1), data=st.data())
@examples(12)
def test_a_row_is_what_it_is_alone(place: int, data: st.DataObject) -> None:
    family, budgets = PLANS[place]
    llm: BudgetedLM = prepared(place)
    first, second = llm.new_session(), llm.new_session()
    history = [torch.zeros(1, 0, dtype=torch.int64)] * 2
    room, where = ROOM, [tensor.data_ptr() for tensor in first.session.state.tensors]
    for turn in range(data.draw(st.integers(1, 3))):
        lengths = data.draw(st.lists(st.integers(0 if turn else 1, 20), min_size=2, max_size=2).filter(any))
        seed = data.draw(st.integers(0, 999))
        rows = [random_ids(1, length, seed + row) for row, length in enumerate(lengths)]
        history = [torch.cat(parts, 1) for parts in zip(history, rows, strict=True)]
        width = max(lengths)
        one = feed(llm, first, rows, "right", width, fill=0)
        other = feed(llm, second, rows[::-1], "left", width + data.draw(st.integers(0, 5)), fill=60)
        compare(llm, first, second, one, other, [length > 0 for length in lengths])
        check(family, budgets, history, one, [length > 0 for length in lengths])
        steps = data.draw(st.integers(0, min(4, room)))
        room -= steps
        for _ in range(steps):
            rows = [random_ids(1, 1, data.draw(st.integers(0, 999))) for _ in range(2)]
            history = [torch.cat(parts, 1) for parts in zip(history, rows, strict=True)]
            one, other = (
                session.step(torch.cat(tokens), None)[:, -1]
                for session, tokens in ((first, rows), (second, rows[::-1]))
            )
            compare(llm, first, second, one, other, [True, True])
            check(family, budgets, history, one, [True, True])
    assert first.kv_bytes == llm.kv_bytes == budgets.kv_bytes(llm, batch_size=2, max_new_tokens=ROOM)
    assert [tensor.data_ptr() for tensor in first.session.state.tensors] == where


def compare(
    llm: BudgetedLM, first: SessionCache, second: SessionCache, one: Tensor, other: Tensor, fed: list[bool]
) -> None:
    """The sessions hold the same tokens and say the same, their rows being the other way round."""
    torch.testing.assert_close(one[fed], other.flip(0)[fed], atol=1e-4, rtol=0)
    assert torch.equal(first.tokens_seen, second.tokens_seen.flip(0))
    for layer in range(len(llm.budgets.capacities)):
        held = first.kept_positions(layer)
        assert torch.equal(held, second.kept_positions(layer).flip(0))
        for row, seen in enumerate(first.tokens_seen.tolist()):
            for kept in held[row].tolist():
                tokens = [token for token in kept if token >= 0]
                assert len(set(tokens)) == len(tokens)
                assert all(token < seen for token in tokens)
                assert seen == 0 or seen - 1 in tokens


def check(family: str, budgets: Budgets, history: list[Tensor], logits: Tensor, fed: list[bool]) -> None:
    """Rows of which every token is held still are transformers' own."""
    for row, ids in enumerate(history):
        if fed[row] and ids.shape[1] <= min(budgets.capacities):
            with torch.no_grad():
                expected = model(family)(ids, use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)
