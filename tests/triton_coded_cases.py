"""The Triton decode kernel over slots of fewer bits: codes are those of `Coding`, to the bit, and outputs those of the
op in plain torch. Not collected by itself, as `triton_cases`."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import DEVICE, DRAWN, LAUNCHES, TOLERANCE, copies, count_of, masked_inputs, scored_inputs

from xkv_fx.evaluation.speed.gpu_session.stage import run_stage
from xkv_fx.runtime import coded_ops  # noqa: F401  (registers the ops)
from xkv_fx.runtime.kernels import decode_coded_triton  # noqa: F401  (registers the ops)
from xkv_fx.runtime.kernels.decode_triton import Launch
from xkv_fx.runtime.quantize import Coding

xkv = torch.ops.xkv
PAIRS = [("int8", "int8"), ("int4", "int4"), ("int8", "int4"), ("fp8", "fp8"), ("model", "int4"), ("fp8", "model")]
# One group of a head, two, and more than halves have; groups and blocks that lie across the halves of a vector.
SHAPES = [((4, 2), (64, 64)), ((6, 2), (80, 96)), ((3, 1), (128, 192)), ((4, 4), (8, 24)), ((2, 1), (72, 40))]
pairs, shapes = st.sampled_from(PAIRS), st.sampled_from(SHAPES)


@dataclasses.dataclass(frozen=True)
class Slots:
    """Four buffers, `k_cache, k_scales, v_cache, v_scales`, and the bits of keys and values."""

    buffers: list[Tensor]
    bits: tuple[int, int]

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, names: tuple[str, str]) -> Slots:
        buffers, bits = [], []
        for vectors, name in ((keys, names[0]), (values, names[1])):
            coding = None if name == "model" else Coding.of(name, vectors.shape[3])
            none = vectors, torch.empty(*vectors.shape[:3], 0, 2, dtype=torch.float16)
            buffers += none if coding is None else coding.encode(vectors)
            bits.append(0 if coding is None else coding.bits)
        return cls(buffers, (bits[0], bits[1]))


def assert_same(out: Tensor, buffers: list[Tensor], expected_out: Tensor, expected: list[Tensor]) -> None:
    tolerance = max(TOLERANCE[out.dtype], 2e-5)
    torch.testing.assert_close(out.cpu(), expected_out, rtol=tolerance, atol=tolerance)
    for after, should in zip(buffers, expected, strict=True):
        torch.testing.assert_close(after.cpu(), should, rtol=0, atol=0, equal_nan=True)


def check_coded(args: list[Any], names: tuple[str, str], launch: Launch, **options: Any) -> None:
    """One step by the kernel and by the op in plain torch, on copies of the same slots."""
    q, k, v, keys, values, slot, mask, scale = args
    slots = Slots.of(keys, values, names)
    ours, theirs = copies(slots.buffers, DEVICE), copies(slots.buffers)
    given_options = [options.get(name) for name in ("softcap", "sink_logits", "key_mean")]
    there = copies([q, k, v, slot, mask, *given_options], DEVICE)
    out = xkv.decode_coded_triton(
        *there[:3], *ours, *there[3:5], count_of(there[4]), scale, *slots.bits, *there[5:], **asdict(launch)
    )
    expected = xkv.decode_coded(q, k, v, *theirs, slot, mask, scale, *slots.bits, *given_options)
    assert_same(out, ours, expected, theirs)


@DRAWN
@given(
    shape=shapes,
    names=pairs,
    rows=st.integers(1, 2),
    slots=st.sampled_from([1, 16, 33]),
    dtype=st.sampled_from(list(TOLERANCE)),
    masking=st.sampled_from(["shared", "each", "bias"]),
    launch=LAUNCHES,
    softcap=st.sampled_from([None, 1.5]),
    with_sinks=st.booleans(),
    centred=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_the_op(
    shape: Any, names: Any, rows: int, slots: int, dtype: torch.dtype, masking: str, launch: Launch,
    softcap: float | None, with_sinks: bool, centred: bool, seed: int,
) -> None:  # fmt: skip
    heads, dims = shape
    args = masked_inputs(heads, dims, rows, slots, dtype, seed, masking)
    sinks = torch.randn(heads[0]) if with_sinks else None
    mean = torch.randn(heads[1], dims[0]) if centred else None
    check_coded(args, names, launch, softcap=softcap, sink_logits=sinks, key_mean=mean)


@pytest.mark.parametrize("names", PAIRS, ids="/".join)
def test_each_pair_of_formats(names: tuple[str, str]) -> None:
    args = masked_inputs((4, 2), (128, 64), 2, 40, torch.float32, 0, "shared")
    check_coded(args, names, Launch(2, 16), key_mean=torch.randn(2, 128))


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_codes_of_any_numbers(name: str) -> None:
    """All alike, none, tiny, huge, outliers, beyond what a float16 scale can hold, halves of a step, and no numbers."""
    args = masked_inputs((8, 8), (80, 80), 2, 5, torch.float32, 0, "shared")
    numbers = torch.randn(16, 80, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 6, 16)[:, None]
    numbers[3], numbers[4], numbers[5, 0], numbers[7, 9] = 3.0, 0.0, 1e5, float("inf")
    numbers[6] = torch.arange(80) % 16 / 2
    slots = Slots.of(args[3], args[4], (name, name))
    ours, theirs = copies(slots.buffers, DEVICE), copies(slots.buffers)
    q, slot, mask = args[0], args[5], args[6]
    token = numbers.view(2, 8, 1, 80)
    there = copies([q, token, token, slot, mask], DEVICE)
    xkv.decode_coded_triton(
        *there[:3], *ours, *there[3:], count_of(there[4]), 0.1, *slots.bits, None, None, None, 1, 16, 4, 2
    )
    xkv.decode_coded(q, token, token, *theirs, slot, mask, 0.1, *slots.bits)
    finite = torch.ones(16, dtype=torch.bool).index_fill(0, torch.tensor([7]), False).view(2, 8)
    for after, should in zip(ours, theirs, strict=True):
        assert torch.equal(after.cpu()[finite], should[finite])
    assert torch.equal(ours[1].cpu().isfinite(), theirs[1].isfinite())


@DRAWN
@given(
    shape=shapes,
    names=pairs,
    slots=st.sampled_from([16, 19]),
    dtype=st.sampled_from(list(TOLERANCE)),
    launch=LAUNCHES,
    softcap=st.sampled_from([None, 1.5]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_scores_are_the_ops(
    shape: Any, names: Any, slots: int, dtype: torch.dtype, launch: Launch, softcap: float | None, with_sinks: bool,
    seed: int,
) -> None:  # fmt: skip
    heads, dims = shape
    q, k, v, keys, values, positions, scores, seen, scale, *_ = scored_inputs(heads, dims, slots, dtype, seed, recent=3)
    held = Slots.of(keys, values, names)
    slot = torch.randint(slots, (3, heads[1]))
    mask = torch.zeros(3, 1, 1, slots, dtype=dtype)
    options = [softcap, torch.randn(heads[0]) if with_sinks else None, None]
    ours, theirs = copies([*held.buffers, positions, scores], DEVICE), copies([*held.buffers, positions, scores])
    there = copies([q, k, v, slot, mask, seen, *options], DEVICE)
    out = xkv.decode_coded_scored_triton(
        *there[:3], *ours, *there[3:5], count_of(there[4]), there[5], scale, *held.bits, *there[6:], **asdict(launch)
    )
    expected = xkv.decode_coded_scored(q, k, v, *theirs, slot, mask, seen, scale, *held.bits, *options)
    torch.testing.assert_close(ours[5].cpu(), theirs[5], rtol=0, atol=max(TOLERANCE[dtype], 1e-5))
    assert_same(out, ours[:5], expected, theirs[:5])


def test_the_kernels_stage_of_a_session_finds_them_equal(tmp_path: Path) -> None:
    record = run_stage("kernels", tmp_path, DEVICE)
    assert record.state == "done", record.why
    assert {row["format"] for row in record.rows} == {"model", "int8", "int4", "fp8"}
    for row in record.rows:
        assert row["error"] < (1e-5 if row["dtype"] == "torch.float32" else 1e-2), row
        assert row["written"], row


def test_what_an_invalid_slot_holds_does_not_matter() -> None:
    """Slots beyond the last valid one are not read; nor is the slot that the token takes, before it is written."""
    args = masked_inputs((4, 2), (64, 64), 2, 70, torch.float32, 0, "shared")
    slot = args[5] = torch.tensor([3, 20])
    args[6] = torch.zeros(2, 1, 1, 70).masked_fill(torch.arange(70) > 40, float("-inf"))
    held = Slots.of(args[3], args[4], ("int8", "int4"))
    spoilt = copies(held.buffers)
    for scales in spoilt[1::2]:
        scales[:, :, 41:] = float("nan")
        scales[torch.arange(2), :, slot] = float("nan")
    outs = []
    for buffers in (spoilt, held.buffers):
        there = copies([*args[:3], *buffers, *args[5:7]], DEVICE)
        count = torch.tensor([41, 41], device=DEVICE)
        outs.append(xkv.decode_coded_triton(*there, count, 0.2, *held.bits, None, None, None, 2, 16, 4, 2))
    assert torch.equal(*outs)
    assert outs[0].isfinite().all()
