"""The CPU decode kernel for slots of fewer bits: it stores what `Coding` stores, to the bit, and attends as loops do to
the vectors that come out of the codes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import oracles as reference
import pytest
import torch
from exhaustive import exhaustive
from oracles.attention_loops import probabilities
from runtime_inputs import random_qkv
from torch import Tensor

from xkv_fx.errors import BudgetError
from xkv_fx.runtime import coded_ops  # noqa: F401  (registers the ops)
from xkv_fx.runtime.coded import Stored
from xkv_fx.runtime.kernels import decode_coded_cpu
from xkv_fx.runtime.quantize import Coding

SCALE = 0.2
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PAIRS = [pair for pair in itertools.product((8, 4, 0), repeat=2) if any(pair)]
SHAPES = [
    ((9, 3), (64, 64)),
    ((14, 2), (80, 80)),
    ((4, 4), (96, 96)),
    ((8, 1), (128, 128)),
    ((6, 2), (256, 48)),
    ((3, 1), (72, 256)),  # no multiple of sixteen
    ((27, 1), (24, 8)),  # more query heads than there are registers for, and codes shorter than a vector
]
# Each kernel takes seconds to build: a shape and a dtype of each pair, the rest among the exhaustive tests.
SOME = [
    (pair, SHAPES[number % len(SHAPES)], list(TOLERANCE)[number % len(TOLERANCE)]) for number, pair in enumerate(PAIRS)
]
CASES = [
    pytest.param(*case, marks=[] if case in SOME else exhaustive)
    for case in itertools.product(PAIRS, SHAPES, TOLERANCE)
    if case in SOME or case[2] == torch.float32 or case[1] == SHAPES[0]
]
# What is left out of the instructions that the kernel has code for. A processor that lacks them anyway tests less.
WITHOUT_LONG = ("__AVX512BW__",)
WITHOUT_VNNI = ("__AVX512VNNI__", "__AVXVNNI__")
PORTABLE = ("__AVX512BW__", "__AVX512VNNI__", "__AVXVNNI__", "__AVX2__", "__F16C__")
INSTRUCTIONS = {
    "AVX-512": WITHOUT_VNNI,
    "AVX-512, no byte shuffles": ("__AVX512VBMI__",),
    "AVX2, VNNI": WITHOUT_LONG,
    "AVX2": (*WITHOUT_LONG, *WITHOUT_VNNI),
    "any": PORTABLE,
}
BOTH_DTYPES = ("AVX2", "any")
Pair = tuple[int, int]


def inputs(
    heads: Pair,
    dims: Pair,
    slots: int,
    pair: Pair,
    dtype: torch.dtype = torch.float32,
    mask_heads: int = 1,
    rows: int = 2,
) -> list[Any]:
    torch.manual_seed(slots)
    q, k, v = random_qkv(heads, 1, dims, rows, dtype)
    _, keys, values = random_qkv(heads, 1, dims, rows, dtype, keys=slots)
    buffers: list[Tensor] = []
    for vectors, bits in ((keys, pair[0]), (values, pair[1])):
        none = vectors, torch.empty(rows, heads[1], slots, 0, 2, dtype=torch.float16)
        buffers += Coding.of_bits(bits, vectors.shape[3]).encode(vectors) if bits else none
    slot = torch.arange(rows) * 7 % slots
    valid = torch.rand(rows, mask_heads, 1, slots) < 0.7
    valid[torch.arange(rows), :, :, slot] = True
    valid[0] = torch.arange(slots) == slot[0]  # a row's very first token: whole chunks hold nothing
    mask = torch.zeros(valid.shape, dtype=dtype).masked_fill(~valid, float("-inf"))
    return [q, k, v, *buffers, slot, mask, SCALE, *pair]


def attend(args: list[Any], **options: Any) -> Tensor:
    """The op, the kernel for these shapes being built."""
    decode_coded_cpu.build(*kernel_of(args))
    out: Tensor = torch.ops.xkv.decode_coded_cpu(*args, **options)
    return out


def kernel_of(args: list[Any]) -> tuple[torch.dtype, int, int, int, int, int]:
    """What `decode_coded_cpu.build` is to be asked for."""
    q, k, v, *_, key_bits, value_bits = args
    return q.dtype, q.shape[1] // k.shape[1], q.shape[3], v.shape[3], key_bits, value_bits


def copies(args: list[Any]) -> list[Any]:
    return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]


def stored(args: list[Any], key_mean: Tensor | None = None) -> list[Tensor]:
    """The buffers once the token is in them, by `Coding`."""
    _, k, v, *buffers, slot, _, _, key_bits, value_bits = copies(args)
    token = k if key_mean is None else k - key_mean[:, None].to(k.dtype)
    at = (torch.arange(k.shape[0])[:, None], torch.arange(k.shape[1]), slot[:, None])
    for new, bits, held in ((token, key_bits, buffers[:2]), (v, value_bits, buffers[2:])):
        Stored.of(held[0], held[1], bits, new.shape[3]).write(new[:, :, 0], at)
    return buffers


def by_loops(args: list[Any], held: list[Tensor], key_mean: Tensor | None = None, **options: Any) -> Tensor:
    """Attention to the vectors that come out of the codes, in float64."""
    q, k, v, *_, slot, mask, scale, key_bits, value_bits = args
    keys, values = Stored.of(*held[:2], key_bits, k.shape[3]), Stored.of(*held[2:], value_bits, v.shape[3])
    k_cache, v_cache = keys.vectors(), values.vectors()
    if key_mean is not None:
        k_cache = k_cache + key_mean[:, None]
    at = slot[:, None, None, None]
    token = [cache.take_along_dim(at, 2) for cache in (k_cache, v_cache)]
    return reference.decode_attention(q.float(), *token, k_cache, v_cache, slot, mask.float(), scale, **options)


def assert_same(args: list[Any], **options: Any) -> None:
    """The kernel leaves the same codes and scales, and its output is that of loops over what they stand for."""
    tested = copies(args)
    assert_right(args, tested, attend(tested, **options), **options)


def assert_right(args: list[Any], tested: list[Any], out: Tensor, **options: Any) -> None:
    """`tested` and `out` are what a kernel made of `args`."""
    held = stored(args, options.get("key_mean"))
    for after, should in zip(tested[3:7], held, strict=True):
        assert torch.equal(after, should)
    tolerance = TOLERANCE[args[0].dtype]
    assert out.dtype == args[0].dtype
    torch.testing.assert_close(out.float(), by_loops(args, held, **options), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("pair", "shape", "dtype"), CASES, ids=str)
def test_it_is_the_reference(pair: Pair, shape: tuple[Pair, Pair], dtype: torch.dtype) -> None:
    for slots in (1, 5, 64, 65, 300, 513):
        assert_same(inputs(*shape, slots, pair, dtype))
    assert_same(inputs(*shape, 77, pair, dtype, mask_heads=shape[0][1]))


@pytest.fixture
def rebuilt() -> Iterator[Callable[[list[Any], tuple[str, ...]], None]]:
    """Builds the kernel for some arguments without some instructions, and as it was afterwards."""
    changed = []

    def rebuild(args: list[Any], lacking: tuple[str, ...]) -> None:
        changed.append(kernel_of(args))
        decode_coded_cpu.build.__wrapped__(*kernel_of(args), lacking=lacking)

    yield rebuild
    for kernel in changed:
        decode_coded_cpu.build.__wrapped__(*kernel)


@pytest.mark.parametrize(
    ("instructions", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if dtype == torch.float32 or name in BOTH_DTYPES else exhaustive)
        for name in INSTRUCTIONS
        for dtype in (torch.float32, torch.bfloat16)
    ],
    ids=str,
)
def test_every_set_of_instructions_computes_the_same(
    instructions: str, dtype: torch.dtype, rebuilt: Callable[[list[Any], tuple[str, ...]], None]
) -> None:
    for slots in (70, 300):
        args = inputs((6, 2), (80, 64), slots, (8, 4), dtype)
        rebuilt(args, INSTRUCTIONS[instructions])
        tested = copies(args)
        assert_right(args, tested, torch.ops.xkv.decode_coded_cpu(*tested))


def scored_inputs(args: list[Any]) -> tuple[list[Any], Tensor]:
    """Those of the op for eviction by score, each KV head with a slot of its own, and its scores."""
    q, k, v, *buffers, slot, mask, scale, key_bits, value_bits = args
    rows, kv_heads, slots = buffers[0].shape[:3]
    own = (slot[:, None] + torch.arange(kv_heads)) % slots
    mask = mask.expand(-1, kv_heads, -1, -1).clone().scatter(3, own[:, :, None, None], 0.0)
    positions = torch.arange(rows * kv_heads * slots, dtype=torch.int32).view(rows, kv_heads, slots)
    scores = torch.rand(rows, kv_heads, slots)
    seen = torch.arange(rows) + 1000
    return [q, k, v, *buffers, positions, scores, own, mask, seen, scale, key_bits, value_bits], scores


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "sink_logits": torch.arange(6.0) - 3}], ids=list)
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.usefixtures("threads")
def test_eviction_by_score_adds_the_attention_of_each_slot(options: dict[str, Any]) -> None:
    for slots in (1, 70, 513):
        assert_scored(inputs((6, 2), (80, 64), slots, (8, 4)), options)


def assert_scored(plain: list[Any], options: dict[str, Any]) -> None:
    decode_coded_cpu.build(*kernel_of(plain))
    args, scores = scored_inputs(plain)
    tested = copies(args)
    out = torch.ops.xkv.decode_coded_scored_cpu(*tested, **options)
    q, k, v, *buffers, positions, _, slot, mask, seen, scale, key_bits, value_bits = copies(args)
    rows, kv_heads = slot.shape
    at = (torch.arange(rows)[:, None], torch.arange(kv_heads), slot)
    keys = Stored.of(*buffers[:2], key_bits, k.shape[3])
    values = Stored.of(*buffers[2:], value_bits, v.shape[3])
    keys.write(k[:, :, 0], at)
    values.write(v[:, :, 0], at)
    positions[at], scores[at] = seen[:, None].expand_as(slot).to(torch.int32), 0.0
    group = q.shape[1] // kv_heads
    for row, head in itertools.product(range(rows), range(kv_heads)):
        shown = mask[row, head, 0] == 0
        for query in range(head * group, (head + 1) * group):
            sink = options["sink_logits"][query] if "sink_logits" in options else None
            weights, _ = probabilities(
                q[row, query, 0], keys.vectors()[row, head, shown], scale, options.get("softcap"), sink
            )
            scores[row, head, shown] += (weights / group).float()
            expected = (weights @ values.vectors()[row, head, shown].double()).float()
            torch.testing.assert_close(out[row, query, 0], expected, rtol=1e-5, atol=1e-5)
    for after, should in zip(tested[3:8], (*buffers, positions), strict=True):
        assert torch.equal(after, should)
    torch.testing.assert_close(tested[8], scores, rtol=1e-5, atol=1e-5)


def test_a_query_that_no_slot_is_shown_to_gets_nothing() -> None:
    args = inputs(*SHAPES[0], 70, (8, 8))
    args[8][1] = float("-inf")
    out = attend(args)
    assert not bool(out[1].any())
    assert bool(out[0].any())


MEAN = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options",
    [{"softcap": 1.5}, {"sink_logits": torch.arange(9.0) - 4}, {"key_mean": MEAN}, {"key_mean": MEAN, "softcap": 1.5}],
    ids=list,
)
def test_soft_cap_sinks_and_mean_keys(options: dict[str, Any]) -> None:
    for mask_heads in (1, 3):
        assert_same(inputs(*SHAPES[0], 77, (8, 8), mask_heads=mask_heads), **options)


def test_a_mean_key_is_taken_off_in_the_dtype() -> None:
    assert_same(inputs((9, 3), (64, 64), 77, (8, 4), torch.bfloat16), key_mean=MEAN)


@pytest.mark.parametrize("pair", [(8, 8), (4, 4)], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80)], ids=str)
def test_codes_of_any_numbers(dims: Pair, pair: Pair) -> None:
    """All alike, none, tiny, huge, outliers, beyond what a float16 scale can hold, and halves of a step."""
    size = dims[0]
    numbers = torch.randn(16, size, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 6, 16)[:, None]
    numbers[3], numbers[4], numbers[5, 0] = 3.0, 0.0, 1e5
    numbers[6] = torch.arange(size) % 16 / 2
    args = inputs((4, 4), dims, 5, pair, rows=4)
    args[1] = args[2] = numbers.view(4, 4, 1, size)
    tested = copies(args)
    attend(tested)
    for after, should in zip(tested[3:7], stored(args), strict=True):
        assert torch.equal(after, should)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_no_number_comes_out_as_none(name: str) -> None:
    args = inputs(*SHAPES[0], 70, (8, 8))
    args["qkv".index(name)][1, 0, 0, 5] = float("nan")
    out = attend(args)
    assert bool(out[1, : 3 if name != "q" else 1].isnan().all())
    assert not bool(out[0].isnan().any())


def test_logits_far_apart_do_not_overflow() -> None:
    args = inputs(*SHAPES[0], 300, (8, 8))
    args[0] = args[0] * 1e4
    expected = by_loops(args, stored(args))
    torch.testing.assert_close(attend(args), expected, rtol=1e-3, atol=1e-3)  # a logit of 1e5 has no more digits


def test_a_slot_outside_the_cache_is_refused_before_anything_is_written() -> None:
    args = inputs(*SHAPES[0], 8, (8, 8))
    args[7] = torch.tensor([0, 8])
    before = copies(args)
    with pytest.raises(RuntimeError, match="outside the 8 slots"):
        attend(args)
    for after, should in zip(args[3:7], before[3:7], strict=True):
        assert torch.equal(after, should)


def test_inputs_are_read_however_they_lie() -> None:
    """All but the buffers: compiled graphs hand them over as they are."""
    args = inputs(*SHAPES[0], 40, (8, 8))
    spread = [arg.repeat_interleave(2, -1)[..., ::2] if isinstance(arg, Tensor) else arg for arg in args]
    spread[3:7] = copies(args[3:7])
    assert not any(spread[number].is_contiguous() for number in (0, 1, 2, 7, 8))
    assert torch.equal(attend(spread), attend(args))
    for after, should in zip(spread[3:7], args[3:7], strict=True):
        assert torch.equal(after, should)


def test_a_mask_may_be_part_of_a_longer_one() -> None:
    args = inputs(*SHAPES[0], 40, (8, 8), mask_heads=3)
    longer = torch.cat((args[8], torch.full((2, 3, 1, 9), float("nan"))), -1)
    args[8] = longer[..., :40]
    assert not args[8].is_contiguous()
    assert_same(args)


def test_registration_is_sound() -> None:
    args = tuple(inputs(*SHAPES[0], 8, (8, 8)))
    decode_coded_cpu.build(torch.float32, 3, 64, 64, 8, 8)
    torch.library.opcheck(torch.ops.xkv.decode_coded_cpu.default, args)


def test_shapes_and_formats_that_no_kernel_was_built_for_are_refused() -> None:
    attend(inputs(*SHAPES[0], 8, (8, 8)))
    for args in (inputs((12, 3), (64, 64), 8, (8, 8)), inputs((9, 3), (16, 64), 8, (4, 8))):
        with pytest.raises(RuntimeError, match="no CPU kernel was built"):
            torch.ops.xkv.decode_coded_cpu(*args)


def test_a_size_that_no_group_divides_is_refused_by_name() -> None:
    with pytest.raises(BudgetError, match="divides a head size of 20"):
        decode_coded_cpu.build(torch.float32, 1, 20, 20, 8, 8)


def test_scored_registration_is_sound() -> None:
    plain = inputs(*SHAPES[0], 8, (8, 8))
    decode_coded_cpu.build(*kernel_of(plain))
    torch.library.opcheck(torch.ops.xkv.decode_coded_scored_cpu.default, tuple(scored_inputs(plain)[0]))
