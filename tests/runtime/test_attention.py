"""The forms of attention against attention by loops in float64."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from runtime_inputs import HEADS, random_qkv
from torch import Tensor

from xkv_fx.runtime import attention as module
from xkv_fx.runtime.attention import apply_sink_logits, causal_attention, merge_attention, slot_attention
from xkv_fx.runtime.form import AttentionForm

# For values drawn from a unit normal. The log-sum-exp is no narrower than float32, but flash kernels round logits.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SCALE = 0.35


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def causal_by_loops(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    sliding_window = options.pop("sliding_window", None)

    def reach(_row: int, _head: int, query: int) -> list[int]:
        return [key for key in range(query + 1) if sliding_window is None or query - key < sliding_window]

    return oracles.attend(q, k, v, reach, SCALE, **options)


def slots_by_loops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    allowed = mask.expand(q.shape[0], k.shape[1], q.shape[2], k.shape[2])
    return oracles.attend(q, k, v, lambda *at: allowed[at].nonzero().flatten().tolist(), SCALE, softcap)


def mask_of(rows: int, heads: int, length: int, slots: int) -> Tensor:
    """Some slots allowed to every query, but none to any of the first row."""
    mask = torch.rand(rows, heads, length, slots) < 0.6
    mask[..., 0] = True
    mask[0] = False
    return mask


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "BLOCK", 4)
    return 4


# Causal attention


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dims", [(8, 8), (3, 16)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 1.5}, {"sliding_window": 4}, {"sliding_window": 4, "softcap": 1.5}, {"sliding_window": 13}],
    ids=str,
)
def test_causal_attention(
    heads: tuple[int, int], dims: tuple[int, int], options: dict[str, Any], small_blocks: int
) -> None:
    for length in (1, small_blocks, 13):
        q, k, v = random_qkv(heads, length, dims)
        out, lse = causal_attention(q, k, v, AttentionForm(SCALE, **options))
        expected, expected_lse = causal_by_loops(q, k, v, **options)
        assert_near(out, expected)
        assert_near(lse, expected_lse)
        assert out.dtype == lse.dtype == torch.float32


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 1.5}, {"sliding_window": 3}, {"sink_logits": torch.tensor([-1.0, 0.0, 1.0, 3.0])}],
    ids=str,
)
def test_causal_attention_in_each_dtype(dtype: torch.dtype, options: dict[str, Any]) -> None:
    q, k, v = random_qkv((4, 2), 11, dtype=dtype)
    out, lse = causal_attention(q, k, v, AttentionForm(SCALE, **options))
    expected, expected_lse = causal_by_loops(q, k, v, **options)
    assert out.dtype == dtype
    assert_near(out, expected, dtype)
    assert_near(lse, expected_lse, dtype)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sliding_window": 20}, {"sliding_window": 300}], ids=str)
def test_causal_attention_of_more_than_a_block(options: dict[str, Any]) -> None:
    q, k, v = random_qkv((2, 1), module.BLOCK + 31, (4, 4), rows=1)
    out, lse = causal_attention(q, k, v, AttentionForm(SCALE, **options))
    expected, expected_lse = causal_by_loops(q, k, v, **options)
    assert_near(out, expected)
    assert_near(lse, expected_lse)


def test_causal_attention_takes_transposed_views() -> None:
    """Models hand over `[rows, S, heads, dim]` seen as `[rows, heads, S, dim]`."""
    q, k, v = random_qkv((4, 2), 9)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for options in ({}, {"softcap": 2.0}):
        assert_near(
            causal_attention(*views, AttentionForm(SCALE, **options))[0], causal_by_loops(q, k, v, **options)[0]
        )


@pytest.mark.parametrize("which", range(3))
def test_elements_of_a_head_may_lie_apart(which: int) -> None:
    """torch's CPU kernel reads them as if they did not, and beyond the end."""
    given = list(random_qkv((4, 2), 9))
    expected = causal_by_loops(*given)[0]
    mask = mask_of(2, 1, 9, 9)
    expected_of_slots = slots_by_loops(*given, mask, None)[0]
    given[which] = given[which].transpose(2, 3).contiguous().transpose(2, 3)
    assert_near(causal_attention(*given, AttentionForm(SCALE))[0], expected)
    assert_near(slot_attention(*given, mask, AttentionForm(SCALE))[0], expected_of_slots)


def test_causal_attention_leaves_padding_behind() -> None:
    """What stands after a query never reaches it, however large it is."""
    q, k, v = random_qkv((4, 2), 9)
    expected = causal_by_loops(q, k, v)[0][:, :, :6]
    k[:, :, 6:], v[:, :, 6:] = 50.0, -1e4
    assert_near(causal_attention(q, k, v, AttentionForm(SCALE))[0][:, :, :6], expected)


def test_large_logits_do_not_overflow(small_blocks: int) -> None:
    q, k, v = random_qkv((4, 2), 9)
    for options in ({}, {"sliding_window": 4}):
        out, lse = causal_attention(q * 1000, k, v, AttentionForm(SCALE, **options))
        expected, expected_lse = causal_by_loops(q * 1000, k, v, **options)
        torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)


def test_sinks_enter_the_denominator_only() -> None:
    q, k, v = random_qkv((4, 2), 7)
    sinks = torch.tensor([-40.0, 0.0, 2.0, 40.0])
    out, lse = causal_attention(q, k, v, AttentionForm(SCALE, sink_logits=sinks))
    plain, plain_lse = causal_attention(q, k, v, AttentionForm(SCALE))
    assert_near(out, causal_by_loops(q, k, v, sink_logits=sinks)[0])
    assert torch.equal(lse, plain_lse)
    assert_near(out[:, 0], plain[:, 0])
    assert out[:, 3].abs().max() < 1e-6
    assert torch.equal(apply_sink_logits(plain, lse, None), plain)


# Attention over slots


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dims", [(8, 8), (8, 5)], ids=str)
@pytest.mark.parametrize("length", [1, 11])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_slot_attention_for_each_shape_of_mask(
    heads: tuple[int, int], dims: tuple[int, int], length: int, softcap: float | None, small_blocks: int
) -> None:
    q, k, v = random_qkv(heads, length, dims, rows=3, keys=6)
    for mask_heads in {1, heads[1]}:
        for mask_length in {1, length}:
            mask = mask_of(3, mask_heads, mask_length, 6)
            out, lse = slot_attention(q, k, v, mask, AttentionForm(SCALE, softcap=softcap))
            expected, expected_lse = slots_by_loops(q, k, v, mask, softcap)
            assert_near(out, expected)
            assert_near(lse, expected_lse)
            assert torch.isinf(lse[0]).all()
            assert not out[0].any()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("mask_heads", [1, 2])
def test_slot_attention_in_each_dtype(dtype: torch.dtype, mask_heads: int) -> None:
    q, k, v = random_qkv((4, 2), 5, dtype=dtype, keys=7)
    mask = mask_of(2, mask_heads, 1, 7)
    out, lse = slot_attention(q, k, v, mask, AttentionForm(SCALE))
    expected, expected_lse = slots_by_loops(q, k, v, mask, None)
    assert out.dtype == dtype
    assert_near(out, expected, dtype)
    assert_near(lse, expected_lse, dtype)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_slot_attention_of_more_than_a_block(softcap: float | None) -> None:
    length = module.BLOCK + 9
    q, k, v = random_qkv((2, 1), length, (4, 4), rows=2, keys=5)
    for mask in (mask_of(2, 1, 1, 5), mask_of(2, 1, length, 5)):
        out, lse = slot_attention(q, k, v, mask, AttentionForm(SCALE, softcap=softcap))
        expected, expected_lse = slots_by_loops(q, k, v, mask, softcap)
        assert_near(out, expected)
        assert_near(lse, expected_lse)


def test_slot_attention_is_blind_to_masked_slots() -> None:
    q, k, v = random_qkv((4, 2), 3, keys=6)
    mask = (torch.arange(6) < 4).expand(2, 1, 1, 6)
    expected = slot_attention(q, k, v, mask, AttentionForm(SCALE))
    k[:, :, 4:], v[:, :, 4:] = 100.0, 1e6
    for got, before in zip(slot_attention(q, k, v, mask, AttentionForm(SCALE)), expected, strict=True):
        assert_near(got, before)


# Merging


@given(
    heads=st.sampled_from(HEADS),
    length=st.integers(1, 9),
    old=st.integers(1, 7),
    sliding_window=st.none() | st.integers(1, 6),
    softcap=st.sampled_from([None, 0.7]),
    value_dim=st.sampled_from([4, 6]),
    seed=st.integers(0, 1000),
)
@examples(25)
def test_merged_halves_are_one_softmax(
    heads: tuple[int, int],
    length: int,
    old: int,
    sliding_window: int | None,
    softcap: float | None,
    value_dim: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    q, k, v = random_qkv(heads, length, (4, value_dim))
    _, old_k, old_v = random_qkv(heads, 1, (4, value_dim), keys=old)
    mask = mask_of(2, 1, length, old)
    first = causal_attention(q, k, v, AttentionForm(SCALE, sliding_window, softcap))
    out, lse = merge_attention(first, slot_attention(q, old_k, old_v, mask, AttentionForm(SCALE, softcap=softcap)))

    def reach(row: int, _head: int, query: int) -> list[int]:
        slots = mask[row, 0, query].nonzero().flatten().tolist()
        return slots + [old + n for n in range(query + 1) if sliding_window is None or query - n < sliding_window]

    together = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
    expected, expected_lse = oracles.attend(q, *together, reach, SCALE, softcap)
    assert_near(out, expected)
    assert_near(lse, expected_lse)
    torch.testing.assert_close(out[0], first[0][0], rtol=1e-6, atol=1e-6)  # the first row has no slot to read


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_merging_keeps_the_dtype_and_its_precision(dtype: torch.dtype) -> None:
    q, k, v = random_qkv((4, 2), 6, dtype=dtype)
    _, old_k, old_v = random_qkv((4, 2), 1, dtype=dtype, keys=9)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    halves = (
        causal_attention(q, k, v, AttentionForm(SCALE)),
        slot_attention(q, old_k, old_v, mask, AttentionForm(SCALE)),
    )
    out, lse = merge_attention(*halves)
    assert out.dtype == dtype
    expected = oracles.extend_attention(q.double(), k, v, old_k, old_v, mask, SCALE)
    assert_near(out, expected, dtype)
    swapped, swapped_lse = merge_attention(*reversed(halves))
    assert_near(swapped, out, dtype)
    assert_near(swapped_lse, lse, dtype if dtype == torch.float64 else torch.float32)
