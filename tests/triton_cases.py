"""The Triton decode kernels against the ops' references. Not collected by itself: `tests/runtime/kernels` runs it under
Triton's interpreter, in a process of its own, and `tests/gpu` on a GPU."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import oracles as reference
import pytest
import torch
from by_policy import scored_by
from exhaustive import EXHAUSTIVE
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from runtime_inputs import random_qkv
from torch import Tensor

from xkv_fx.runtime.kernels.decode_triton import Launch, split_size

xkv = torch.ops.xkv
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DRAWN = settings(  # shrinking what fails would take minutes under the interpreter
    max_examples=300 if DEVICE != "cpu" else 12 if EXHAUSTIVE else 6,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
)
SCALE = 0.2
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = st.sampled_from(
    [
        ((1, 1), (16, 16)),
        ((4, 2), (32, 16)),
        ((6, 2), (80, 80)),
        ((3, 1), (16, 96)),
        ((4, 4), (8, 20)),
        ((20, 1), (40, 8)),
    ]
)
LAUNCHES = st.builds(Launch, splits=st.integers(1, 4), block=st.sampled_from([16, 32]))


def drawn_inputs(
    heads: tuple[int, int], dims: tuple[int, int], rows: int, slots: int, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """Queries, keys and values of one token, and two full buffers."""
    torch.manual_seed(seed)
    q, k, v = random_qkv(heads, 1, dims, rows, dtype)
    _, k_cache, v_cache = random_qkv(heads, 1, dims, rows, dtype, keys=slots)
    return [q, k, v, k_cache, v_cache]


def masked_inputs(
    heads: tuple[int, int], dims: tuple[int, int], rows: int, slots: int, dtype: torch.dtype, seed: int, masking: str
) -> list[Any]:
    """Arguments of `decode_attention`; `masking` is `"shared"` by all heads, a mask `"each"` KV head, or a `"bias"`."""
    tensors = drawn_inputs(heads, dims, rows, slots, dtype, seed)
    slot = torch.randint(slots, (rows,))
    mask_heads = {"shared": 1, "each": heads[1], "bias": heads[0]}[masking]
    valid = torch.rand(rows, mask_heads, 1, slots) < 0.7
    valid &= torch.arange(slots) < torch.randint(1, slots + 1, (rows, 1, 1, 1))
    valid[0] = False  # a row's very first token: whole blocks and splits hold nothing
    valid[torch.arange(rows), :, :, slot] = True
    biased = masking == "bias" and heads[0] != heads[1]
    mask = torch.randn(valid.shape) if biased else torch.zeros(valid.shape, dtype=dtype)
    return [*tensors, slot, mask.masked_fill(~valid, float("-inf")), SCALE]


def scored_inputs(
    heads: tuple[int, int], dims: tuple[int, int], slots: int, dtype: torch.dtype, seed: int, recent: int
) -> list[Any]:
    """Arguments of `decode_scored`: rows that have seen nothing, less than they can hold, and more, in any order."""
    tensors = drawn_inputs(heads, dims, 3, slots, dtype, seed)
    seen = torch.tensor([0, slots // 2, slots + 20])
    positions = torch.arange(slots, dtype=torch.int32).expand(3, heads[1], slots).clone()
    for head in range(heads[1]):
        kept = torch.randperm(slots + 20 - recent)[: slots - recent]
        newest = torch.arange(slots + 20 - recent, slots + 20)
        positions[2, head] = torch.cat((kept, newest))[torch.randperm(slots)]
    scores = torch.rand(3, heads[1], slots) * (torch.arange(slots) < seen[:, None])[:, None]
    return [*tensors, positions, scores, seen, SCALE, recent, 1 if recent < slots else 0]


def copies(args: list[Any], device: str = "cpu") -> list[Any]:
    return [arg.to(device, copy=True) if isinstance(arg, Tensor) else arg for arg in args]


def assert_same(out: Tensor, tested: list[Any], expected_out: Tensor, expected: list[Any]) -> None:
    """Outputs are near; what is moved and not computed is the same, to the bit; so is what no one may touch."""
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.cpu(), expected_out, rtol=tolerance, atol=tolerance)
    for after, should in zip(tested, expected, strict=True):
        if isinstance(after, Tensor) and not after.is_floating_point():
            assert torch.equal(after.cpu(), should)
        elif isinstance(after, Tensor):
            torch.testing.assert_close(after.cpu(), should, rtol=0, atol=0)


def count_of(mask: Tensor) -> Tensor:
    """One more than the last slot of each row that a mask lets through."""
    return ((mask > float("-inf")) * torch.arange(1, mask.shape[3] + 1, device=mask.device)).amax((1, 2, 3))


def check_masked(
    args: list[Any], launch: Launch, softcap: float | None = None, sink_logits: Tensor | None = None
) -> None:
    tested, expected = copies(args, DEVICE), copies(args)
    there = None if sink_logits is None else sink_logits.to(DEVICE)
    out = xkv.decode_attention_triton(*tested[:7], count_of(tested[6]), SCALE, softcap, there, **asdict(launch))
    assert_same(out, tested, reference.decode_attention(*expected, softcap, sink_logits), expected)


def scored_step(args: list[Any], launch: Launch, **options: Any) -> Tensor:
    """The kernel, called as the oracle of `xkv::decode_scored` is."""

    def kernel(*given: Any) -> Tensor:
        *tensors, mask, seen, scale, softcap, sink_logits = given
        counted = (mask, count_of(mask), seen, scale, softcap, sink_logits)
        out: Tensor = xkv.decode_scored_triton(*tensors, *counted, **asdict(launch))
        return out

    there = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in options.items()}
    return scored_by(kernel, DEVICE)(*args, **there)


def check_scored(args: list[Any], launch: Launch, **options: Any) -> None:
    tested, expected = copies(args, DEVICE), copies(args)
    out = scored_step(tested, launch, **options)
    by_loops = reference.decode_scored(*expected, **options)
    torch.testing.assert_close(tested[6].cpu(), expected[6], rtol=0, atol=max(TOLERANCE[out.dtype], 1e-5))
    tested[6] = expected[6]
    assert_same(out, tested, by_loops, expected)


@DRAWN
@given(
    shape=SHAPES,
    rows=st.integers(1, 3),
    slots=st.sampled_from([1, 5, 16, 33, 70]),
    dtype=st.sampled_from(list(TOLERANCE)),
    masking=st.sampled_from(["shared", "each", "bias"]),
    launch=LAUNCHES,
    softcap=st.sampled_from([None, 1.5]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_the_reference(
    shape: Any, rows: int, slots: int, dtype: torch.dtype, masking: str, launch: Launch, softcap: float | None,
    with_sinks: bool, seed: int,
) -> None:  # fmt: skip
    args = masked_inputs(*shape, rows, slots, dtype, seed, masking)
    check_masked(args, launch, softcap, torch.randn(shape[0][0]) if with_sinks else None)


@DRAWN
@given(
    shape=SHAPES,
    slots=st.sampled_from([5, 16, 19]),
    dtype=st.sampled_from(list(TOLERANCE)),
    launch=LAUNCHES,
    sliding_window=st.sampled_from([None, 9, 40]),
    softcap=st.sampled_from([None, 1.5]),
    with_sinks=st.booleans(),
    sloped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_scores_are_the_references(
    shape: Any, slots: int, dtype: torch.dtype, launch: Launch, sliding_window: int | None, softcap: float | None,
    with_sinks: bool, sloped: bool, seed: int,
) -> None:  # fmt: skip
    args = scored_inputs(*shape, slots, dtype, seed, recent=3)
    sinks = torch.randn(shape[0][0]) if with_sinks else None
    slopes = torch.rand(shape[0][0]) / 4 if sloped else None
    check_scored(args, launch, sliding_window=sliding_window, softcap=softcap, sink_logits=sinks, slopes=slopes)


def test_scores_accumulate_step_by_step() -> None:
    """What one step leaves behind decides later ones."""
    args = scored_inputs((6, 2), (16, 16), 8, torch.float32, 0, recent=2)
    tested, expected = copies(args, DEVICE), copies(args)
    for step in range(4):
        token = list(random_qkv((6, 2), 1, (16, 16), rows=3))
        seen = args[7] + step
        tested[:3], tested[7] = copies(token, DEVICE), seen.to(DEVICE)
        expected[:3], expected[7] = copies(token), seen
        out = scored_step(tested, Launch(2, 16))
        torch.testing.assert_close(out.cpu(), reference.decode_scored(*expected), rtol=1e-5, atol=1e-5)
        assert torch.equal(tested[5].cpu(), expected[5])
        torch.testing.assert_close(tested[6].cpu(), expected[6], rtol=0, atol=1e-5)


def test_logits_far_apart_do_not_overflow() -> None:
    args = masked_inputs((4, 2), (16, 16), 2, 70, torch.float32, 0, "shared")
    args[0] = args[0] * 1e4
    check_masked(args, Launch(2, 16))
    check_masked(args, Launch(1, 16), softcap=30.0)


def test_what_an_invalid_slot_holds_does_not_matter() -> None:
    """Slots beyond the last valid one are not read; nor is the slot that the token takes, before it is written."""
    args = masked_inputs((4, 2), (16, 16), 2, 70, torch.float32, 0, "shared")
    slot = args[5] = torch.tensor([3, 20])
    args[6] = torch.zeros(2, 1, 1, 70).masked_fill(torch.arange(70) > 40, float("-inf"))
    for cache in args[3:5]:
        cache[:, :, 41:] = float("nan")
        cache[torch.arange(2), :, slot] = float("nan")
    tested, clean = copies(args, DEVICE), copies(args, DEVICE)
    for cache in clean[3:5]:
        cache.nan_to_num_()
    count = torch.tensor([41, 41], device=DEVICE)
    outs = [xkv.decode_attention_triton(*a[:7], count, SCALE, None, None, 2, 16, 4, 2) for a in (tested, clean)]
    assert torch.equal(*outs)
    assert outs[0].isfinite().all()


def test_views_are_read_as_they_look() -> None:
    args = masked_inputs((4, 2), (16, 16), 2, 40, torch.float32, 0, "shared")
    args[:3] = [torch.stack((x, x), -1)[..., 0] for x in args[:3]]
    args[6] = torch.stack((args[6], args[6]), -1)[..., 0]
    assert not args[0].is_contiguous()
    check_masked(args, Launch(2, 16))


def test_the_same_bits_every_time() -> None:
    args = masked_inputs((6, 2), (16, 16), 2, 40, torch.bfloat16, 0, "shared")
    count = torch.tensor([40, 40], device=DEVICE)
    first, second = (
        xkv.decode_attention_triton(*copies(args, DEVICE)[:7], count, SCALE, None, None, 3, 16, 4, 2) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(("slots", "splits"), [(1, 1), (16, 4), (17, 2), (100, 3), (1000, 7)])
def test_splits_cover_every_slot_in_whole_blocks(slots: int, splits: int) -> None:
    size = split_size(slots, Launch(splits, 16))
    assert size % 16 == 0
    assert -(-slots // size) <= splits
