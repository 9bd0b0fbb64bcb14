"""The CPU decode kernel against the op that it stands for, on every shape that it serves."""

from __future__ import annotations

from typing import Any

import oracles as reference
import pytest
import torch
from exhaustive import exhaustive
from runtime_inputs import random_qkv
from torch import Tensor
from torch._inductor.codecache import CppCodeCache

from xkv_fx.errors import BackendError
from xkv_fx.runtime.kernels import decode_cpu

SCALE = 0.2
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [((3, 1), (16, 16)), ((4, 4), (32, 16)), ((9, 3), (64, 64)), ((8, 1), (16, 48)), ((14, 2), (80, 80))]
# Each kernel takes seconds to build: one shape in every dtype, the others in one; the rest among the exhaustive tests.
CASES = [
    pytest.param(heads, dims, dtype, marks=[] if dtype in some else exhaustive)
    for (heads, dims), some in zip(
        SHAPES, [[torch.float32], [torch.bfloat16], list(TOLERANCE), [torch.float16], [torch.bfloat16]], strict=True
    )
    for dtype in TOLERANCE
]


def inputs(
    heads: tuple[int, int], dims: tuple[int, int], slots: int, dtype: torch.dtype, mask_heads: int = 1, rows: int = 2
) -> list[Any]:
    torch.manual_seed(slots)
    q, k, v = random_qkv(heads, 1, dims, rows, dtype)
    _, k_cache, v_cache = random_qkv(heads, 1, dims, rows, dtype, keys=slots)
    slot = torch.arange(rows) * 7 % slots
    valid = torch.rand(rows, mask_heads, 1, slots) < 0.7
    valid[torch.arange(rows), :, :, slot] = True
    valid[0] = torch.arange(slots) == slot[0]  # a row's very first token: whole chunks hold nothing
    mask = torch.zeros(valid.shape, dtype=dtype).masked_fill(~valid, float("-inf"))
    return [q, k, v, k_cache, v_cache, slot, mask, SCALE]


def attend(args: list[Any], **options: Any) -> Tensor:
    """The op, the kernel for these shapes being built."""
    q, _, _, k_cache, v_cache, *_ = args
    decode_cpu.build(q.dtype, q.shape[1] // k_cache.shape[1], k_cache.shape[3], v_cache.shape[3])
    out: Tensor = torch.ops.xkv.decode_attention_cpu(*args, **options)
    return out


def copies(args: list[Any]) -> list[Any]:
    return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]


def assert_same(args: list[Any], **options: Any) -> None:
    """The kernel's output is the reference's, and it leaves the same caches."""
    tested, expected = copies(args), copies(args)
    out = attend(tested, **options)
    by_loops = reference.decode_attention(*expected, **options)
    tolerance = TOLERANCE[args[0].dtype]
    torch.testing.assert_close(out, by_loops, rtol=tolerance, atol=tolerance)
    for after, should in zip(tested, expected, strict=True):
        assert not isinstance(after, Tensor) or torch.equal(after, should)


@pytest.mark.parametrize(("heads", "dims", "dtype"), CASES, ids=str)
def test_it_is_the_reference(heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> None:
    for slots in (1, 5, 64, 65, 300, 513):
        assert_same(inputs(heads, dims, slots, dtype))


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"sink_logits": torch.tensor([-1.0, 0.0, 1.0, 3.0])}], ids=str)
def test_soft_cap_and_sinks(options: dict[str, Any]) -> None:
    for mask_heads in (1, 2):
        assert_same(inputs((4, 2), (16, 16), 77, torch.float32, mask_heads), **options)


def test_views_are_read_as_they_look() -> None:
    q, k, v, *rest = inputs((4, 2), (16, 16), 40, torch.float32)
    q, k, v = (torch.stack((x, x), -1)[..., 0] for x in (q, k, v))
    assert not q.is_contiguous()
    assert_same([q, k, v, *rest])


@pytest.mark.parametrize("mask_heads", [1, 2])
def test_a_mask_may_be_part_of_a_longer_one(mask_heads: int) -> None:
    args = inputs((4, 2), (16, 16), 40, torch.float32, mask_heads)
    longer = torch.cat((args[6], torch.full((2, mask_heads, 1, 9), float("nan"))), -1)
    args[6] = longer[..., :40]
    assert not args[6].is_contiguous()
    assert_same(args)


def test_logits_far_apart_do_not_overflow() -> None:
    args = inputs((4, 2), (16, 16), 300, torch.float32)
    args[0] = args[0] * 1e4
    assert_same(args)


def test_a_slot_outside_the_cache_is_refused_before_anything_is_written() -> None:
    args = inputs((4, 2), (16, 16), 8, torch.float32)
    args[5] = torch.tensor([0, 8])
    caches = args[3].clone(), args[4].clone()
    with pytest.raises(RuntimeError, match="outside the 8 slots"):
        attend(args)
    assert torch.equal(args[3], caches[0])
    assert torch.equal(args[4], caches[1])


def test_inputs_are_read_however_they_lie() -> None:
    """All but the caches: compiled graphs hand them over as they are."""
    args = inputs((4, 2), (16, 16), 8, torch.float32)
    spread = [arg.repeat_interleave(2, -1)[..., ::2] if isinstance(arg, Tensor) else arg for arg in args]
    spread[3:5] = args[3].clone(), args[4].clone()
    assert not any(spread[number].is_contiguous() for number in (0, 1, 2, 5, 6))
    assert torch.equal(attend(spread), attend(args))
    assert torch.equal(spread[3], args[3])
    assert torch.equal(spread[4], args[4])


def test_registration_is_sound() -> None:
    args = tuple(inputs((4, 2), (16, 16), 8, torch.float32))
    decode_cpu.build(torch.float32, 2, 16, 16)
    torch.library.opcheck(torch.ops.xkv.decode_attention_cpu.default, args)


def test_shapes_that_no_kernel_was_built_for_are_refused() -> None:
    args = inputs((10, 2), (16, 16), 8, torch.float32)
    attend(inputs((4, 2), (16, 16), 8, torch.float32))
    with pytest.raises(RuntimeError, match="no CPU kernel was built"):
        torch.ops.xkv.decode_attention_cpu(*args)


def test_without_a_compiler_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(CppCodeCache, "load", none)
    with pytest.raises(BackendError, match="no such compiler"):
        decode_cpu.build(torch.float32, 7, 16, 16)
