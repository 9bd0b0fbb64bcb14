"""One call for all caches of a layer: each cache gets its token, and each head's output is that of loops over what the
slots of its cache stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import oracles as reference
import pytest
import torch
from runtime_inputs import random_qkv
from torch import Tensor

from xkv_fx.runtime.coded import Stored
from xkv_fx.runtime.kernels import decode_coded_cpu, decode_cpu, decode_heads_cpu  # noqa: F401  (defines the operator)
from xkv_fx.runtime.quantize import Coding

ROWS, WIDTH, SIZE, SCALE = 2, 3, 16, 0.2
Cache = tuple[tuple[int, ...], int, tuple[int, int]]
"""Its KV heads, slots and bits."""
RAGGED: list[Cache] = [((0, 3), 300, (8, 4)), ((2,), 40, (4, 4)), ((1,), 700, (8, 4)), ((4,), 9, (4, 4))]
MIXED: list[Cache] = [((1,), 513, (0, 0)), ((0, 2), 100, (8, 4)), ((3,), 65, (0, 0)), ((4,), 1, (4, 4))]
HEADS = 5


def inputs(caches: Sequence[Cache], mask_heads: bool = False, means: bool = False) -> list[Any]:
    torch.manual_seed(len(caches))
    q, k, v = random_qkv((HEADS * WIDTH, HEADS), 1, (SIZE, SIZE), ROWS)
    buffers: list[Tensor] = []
    slots: list[Tensor] = []
    masks: list[Tensor] = []
    for heads, count, bits in caches:
        _, keys, values = random_qkv((1, len(heads)), 1, (SIZE, SIZE), ROWS, keys=count)
        for vectors, each in zip((keys, values), bits, strict=True):
            buffers += Coding.of_bits(each, SIZE).encode(vectors) if each else [vectors]
        slots.append(torch.arange(ROWS) * 7 % count)
        shown = torch.rand(ROWS, len(heads) if mask_heads else 1, 1, count) < 0.7
        shown[torch.arange(ROWS), :, :, slots[-1]] = True
        masks.append(torch.zeros(shown.shape).masked_fill(~shown, float("-inf")))
        if any(bits):
            decode_coded_cpu.build(q.dtype, WIDTH, SIZE, SIZE, *bits)
        else:
            decode_cpu.build(q.dtype, WIDTH, SIZE, SIZE)
    places = [head for heads, *_ in caches for head in heads]
    key_means = [torch.randn(len(heads), SIZE) for heads, _, bits in caches if any(bits)] if means else []
    return [q, k, v, buffers, slots, masks, places, [each for *_, bits in caches for each in bits], SCALE, key_means]


def attend(args: list[Any], softcap: float | None = None, sink_logits: Tensor | None = None) -> Tensor:
    *given, key_means = args
    out: Tensor = torch.ops.xkv.decode_heads_cpu(*given, softcap, sink_logits, key_means)
    return out


def by_loops(args: list[Any], caches: Sequence[Cache], sink_logits: Tensor | None = None, **options: Any) -> Tensor:
    """The token is written to `args`."""
    q, k, v, buffers, slots, masks, *_, key_means = args
    out = torch.full_like(q, float("nan"))
    held, means = iter(buffers), iter(key_means)
    for (heads, _, bits), slot, mask in zip(caches, slots, masks, strict=True):
        asked = [head * WIDTH + n for head in heads for n in range(WIDTH)]
        mean = next(means)[:, None] if key_means and any(bits) else torch.zeros(())
        at = (torch.arange(ROWS)[:, None], torch.arange(len(heads)), slot[:, None])
        vectors = []
        for token, each in ((k[:, heads] - mean, bits[0]), (v[:, heads], bits[1])):
            cache = next(held)
            stored = Stored.of(cache, next(held) if any(bits) else cache[..., :0, None], each, SIZE)
            stored.write(token[:, :, 0], at)
            vectors.append(stored.vectors())
        vectors[0] = vectors[0] + mean
        written = [cache.take_along_dim(slot[:, None, None, None], 2) for cache in vectors]
        sinks = None if sink_logits is None else sink_logits[asked]
        out[:, asked] = reference.decode_attention(
            q[:, asked], *written, *vectors, slot, mask, SCALE, sink_logits=sinks, **options
        )
    return out


def copies(args: list[Any]) -> list[Any]:
    return [
        [x.clone() for x in arg] if isinstance(arg, list) and arg and isinstance(arg[0], Tensor) else arg
        for arg in args
    ]


def assert_same(args: list[Any], caches: Sequence[Cache], **options: Any) -> None:
    tested, expected = copies(args), copies(args)
    torch.testing.assert_close(attend(tested, **options), by_loops(expected, caches, **options), rtol=1e-4, atol=1e-4)
    for after, should in zip(tested[3], expected[3], strict=True):
        assert torch.equal(after, should)


@pytest.mark.parametrize("threads", [1, 2, 7], indirect=True)
@pytest.mark.parametrize("caches", [RAGGED, MIXED], ids=["codes", "codes and the dtype"])
@pytest.mark.usefixtures("threads")
def test_each_head_attends_to_its_own_cache(caches: list[Cache]) -> None:
    assert_same(inputs(caches), caches)


@pytest.mark.parametrize(
    "options",
    [{"softcap": 1.5}, {"sink_logits": torch.linspace(-2, 3, HEADS * WIDTH)}, {}],
    ids=["softcap", "sinks", ""],
)
@pytest.mark.parametrize("caches", [RAGGED, MIXED], ids=["codes", "codes and the dtype"])
def test_masks_by_head_soft_cap_sinks_and_mean_keys(caches: list[Cache], options: dict[str, Any]) -> None:
    assert_same(inputs(caches, mask_heads=True, means=True), caches, **options)


def test_tokens_are_read_however_they_lie() -> None:
    args = inputs(RAGGED)
    args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    args[1] = args[1].repeat_interleave(2, -1)[..., ::2]
    args[2] = torch.cat((args[2], args[2]), 1)[:, :HEADS]
    assert not any(x.is_contiguous() for x in args[:3])
    assert_same(args, RAGGED)


def test_a_slot_outside_one_cache_is_refused_before_anything_is_written() -> None:
    args = inputs(RAGGED)
    args[4][-1] = torch.tensor([0, 9])
    before = copies(args)
    with pytest.raises(RuntimeError, match="outside the 9 slots"):
        attend(args)
    assert all(map(torch.equal, args[3], before[3]))


@pytest.mark.parametrize("places", [[0, 3, 2, 1, 5], [0, 3, 2, 1, 1], [0, 3, 2, 1, -1], [0, 3, 2, 1]], ids=str)
def test_each_head_has_one_cache(places: list[int]) -> None:
    args = inputs(RAGGED)
    args[6] = places
    with pytest.raises(RuntimeError, match=r"must have one cache|too few places"):
        attend(args)


def test_heads_without_a_cache_and_caches_without_tensors_are_refused() -> None:
    args = inputs(RAGGED)
    with pytest.raises(RuntimeError, match="must have one cache"):
        attend([*args[:7], args[7][:-2], *args[8:]])
    with pytest.raises(RuntimeError, match="too few tensors"):
        attend([*args[:3], args[3][:-1], *args[4:]])


def test_sink_logits_and_mean_keys_of_another_dtype_are_refused() -> None:
    args = inputs(RAGGED, means=True)
    with pytest.raises(RuntimeError, match="sink logits must be float32"):
        attend(args, sink_logits=torch.zeros(HEADS * WIDTH, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="mean keys must be float32"):
        attend([*args[:-1], [mean.half() for mean in args[-1]]])


def test_registration_is_sound() -> None:
    *given, means = inputs(MIXED, means=True)
    torch.library.opcheck(torch.ops.xkv.decode_heads_cpu.default, (*given, None, None, means))
