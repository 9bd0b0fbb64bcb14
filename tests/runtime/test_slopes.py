"""ALiBi's slopes (arXiv 2108.12409) in every form of attention, and in the scores, against loops in float64."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from by_policy import scored_by
from runtime_inputs import random_qkv
from torch import Tensor

from xkv_fx.runtime import ops  # noqa: F401  (registers the ops)
from xkv_fx.runtime.scorers import make_scorer, rescore_tokens, score_tokens
from xkv_fx.runtime.slots import SlotPlan

xkv = torch.ops.xkv
SCALE = 0.35
HEADS = [(4, 4), (4, 2), (6, 1)]
each_heads = pytest.mark.parametrize("heads", HEADS, ids=str)
each_options = pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sliding_window": 3}], ids=str)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def slopes_of(heads: tuple[int, int]) -> Tensor:
    return torch.linspace(0.05, 0.7, heads[0])


def copies(args: list[Any]) -> list[Any]:
    return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]


def assert_same(op: Any, by_loops: Any, args: list[Any], **options: Any) -> None:
    tested, expected = copies(args), copies(args)
    torch.testing.assert_close(op(*tested, **options), by_loops(*expected, **options), rtol=3e-6, atol=3e-6)
    for got, wanted in zip(tested, expected, strict=True):
        if isinstance(got, Tensor):
            torch.testing.assert_close(got, wanted, rtol=3e-6, atol=3e-6)


@each_options
@each_heads
def test_attention(heads: tuple[int, int], options: dict[str, Any]) -> None:
    args = [*random_qkv(heads, 7, (8, 6)), 0, SCALE]
    assert_same(xkv.attention, oracles.attention, args, slopes=slopes_of(heads), **options)
    torch.library.opcheck(xkv.attention.default, tuple(args), {"slopes": slopes_of(heads), **options})


def test_attention_over_several_blocks_of_queries() -> None:
    q, k, v = random_qkv((2, 1), 300)
    slopes = torch.tensor([0.01, 0.5])
    distance = torch.arange(300)[:, None] - torch.arange(300)
    bias = (-slopes[:, None, None] * distance).masked_fill(distance < 0, float("-inf"))
    repeated = (tensor.expand(-1, 2, -1, -1) for tensor in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, *repeated, attn_mask=bias, scale=SCALE)
    torch.testing.assert_close(xkv.attention(q, k, v, 0, SCALE, slopes=slopes), expected, atol=2e-5, rtol=0)


@each_options
@each_heads
def test_extend_attention(heads: tuple[int, int], options: dict[str, Any]) -> None:
    q, k, v = random_qkv(heads, 5, (8, 6))
    _, k_cache, v_cache = random_qkv(heads, 1, (8, 6), keys=6)
    mask = torch.rand(2, 1, 1, 6) < 0.6
    mask[0] = False
    ages = torch.randint(1, 40, (2, heads[1], 6))
    args = [q, k, v, k_cache, v_cache, mask, SCALE]
    slopes = slopes_of(heads)
    assert_same(xkv.extend_attention, oracles.extend_attention, args, slopes=slopes, ages=ages, **options)
    torch.library.opcheck(xkv.extend_attention.default, tuple(args), {"slopes": slopes, "ages": ages, **options})


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sink_logits": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_heads
def test_decode_attention_with_a_biased_mask(
    heads: tuple[int, int], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    q, k, v = random_qkv(heads, 1, (8, 6), rows=3, dtype=dtype)
    _, k_cache, v_cache = random_qkv(heads, 1, (8, 6), rows=3, dtype=dtype, keys=6)
    slot = torch.tensor([0, 3, 5])
    valid = torch.rand(3, 1, 1, 6) < 0.5
    valid[torch.arange(3), :, :, slot] = True
    mask = (-slopes_of(heads)[:, None, None] * torch.rand(3, heads[0], 1, 6) * 9).masked_fill(~valid, float("-inf"))
    options = {name: torch.ones(heads[0]) if name == "sink_logits" else value for name, value in options.items()}
    args = [q, k, v, k_cache, v_cache, slot, mask, SCALE]
    tested, expected = copies(args), copies(args)
    got, wanted = xkv.decode_attention(*tested, **options), oracles.decode_attention(*expected, **options)
    tolerance = 3e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    torch.library.opcheck(xkv.decode_attention.default, tuple(args), options)


@each_options
@each_heads
def test_decode_scored(heads: tuple[int, int], options: dict[str, Any]) -> None:
    q, k, v = random_qkv(heads, 1, (8, 6), rows=3)
    _, k_cache, v_cache = random_qkv(heads, 1, (8, 6), rows=3, keys=6)
    seen = torch.tensor([0, 4, 30])
    positions = torch.arange(6, dtype=torch.int32).expand(3, heads[1], 6).clone()
    positions[2] = torch.tensor([0, 28, 11, 29, 7, 20], dtype=torch.int32)
    scores = torch.rand(3, heads[1], 6) * (torch.arange(6) < seen[:, None])[:, None]
    args = [q, k, v, k_cache, v_cache, positions, scores, seen, SCALE, 2, 1]
    assert_same(scored_by(xkv.decode_scored), oracles.decode_scored, args, slopes=slopes_of(heads), **options)


@pytest.mark.parametrize("eviction", ["ring", "append", "none", "scored"])
def test_ages_count_from_the_next_token(eviction: Any) -> None:
    plan = SlotPlan(6, 9 if eviction == "append" else 6, 2, 0, eviction)
    positions = torch.arange(plan.slots, dtype=torch.int32).expand(1, 2, -1).contiguous()
    seen, base = torch.tensor([5]), torch.tensor([3])
    before = plan.ordinals(positions, seen, base)
    ages = plan.extend_ages(positions, seen, base)
    assert torch.equal(ages[before >= 0], 5 - before[before >= 0])
    after = plan.ordinals(positions, seen + 1, base)
    ages = plan.decode_ages(positions, seen, base)
    assert torch.equal(ages[after >= 0], 5 - after[after >= 0])
    assert int(ages[after >= 0].min()) == 0, "the token itself"


@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova"])
@each_heads
def test_scores_are_those_of_biased_attention(heads: tuple[int, int], name: str) -> None:
    """A bias is as good as one more dimension of queries and keys, where a score may look for itself."""
    q, k, v = random_qkv(heads, 9)
    slopes, place = slopes_of(heads), torch.arange(9.0)
    wide_q = torch.cat((q, (slopes / SCALE)[:, None, None].expand(2, -1, 9, 1)), -1)
    wide_k = torch.cat((k, place[:, None].expand(2, heads[1], 9, 1)), -1)
    length = torch.tensor([9, 6])
    scorer = make_scorer(name, {})
    got = score_tokens(q, k, v, length, None, SCALE, scorer, slopes=slopes)
    torch.testing.assert_close(got, score_tokens(wide_q, wide_k, v, length, None, SCALE, scorer), rtol=1e-4, atol=1e-5)

    plan = SlotPlan(5, 5, 2, 0, "ring")
    _, old_k, old_v = random_qkv(heads, 1, keys=5)
    positions = torch.arange(5, dtype=torch.int32).expand(2, heads[1], 5).contiguous()
    seen = base = torch.tensor([5, 5])
    wide_old = torch.cat((old_k, (torch.arange(5.0) - 5)[:, None].expand(2, heads[1], 5, 1)), -1)
    got = rescore_tokens(q, k, v, length, seen, base, old_k, old_v, positions, SCALE, scorer, plan, slopes=slopes)
    wide = rescore_tokens(wide_q, wide_k, v, length, seen, base, wide_old, old_v, positions, SCALE, scorer, plan)
    torch.testing.assert_close(got, wide, rtol=1e-4, atol=1e-5)
