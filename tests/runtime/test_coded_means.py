"""The ops over slots of fewer bits, keys stored without their mean: codes to the bit, outputs those of whole keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xkv_fx.runtime import coded_ops, ops  # noqa: F401  (register the ops)
from xkv_fx.runtime.any_length import extend_coded as extend_of_any_length
from xkv_fx.runtime.coded import Stored
from xkv_fx.runtime.quantize import Coding

ROWS, HEADS, KV_HEADS, SLOTS, NEW, DIM = 2, 6, 3, 11, 5, 16
SCALE = DIM**-0.5
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sink logits": {"sink_logits": torch.linspace(-2, 3, HEADS)},
    "both": {"softcap": 2.0, "sink_logits": torch.linspace(-2, 3, HEADS)},
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MEAN = 4 * random(KV_HEADS, DIM, seed=9)


def buffers(bits: int, mean: Tensor | None = MEAN) -> list[Tensor]:
    """Codes and scales of keys around the mean, and of values."""
    coding = Coding.of_bits(bits, DIM)
    keys = random(ROWS, KV_HEADS, SLOTS, DIM, seed=1) + MEAN[:, None]
    k = coding.encode(keys if mean is None else keys - mean[:, None])
    return [*k, *coding.encode(random(ROWS, KV_HEADS, SLOTS, DIM, seed=2))]


def whole(held: list[Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """The keys and values that buffers stand for."""
    keys, values = Stored.of(*held[:2], bits, DIM, MEAN), Stored.of(*held[2:], bits, DIM)
    return keys.vectors(), values.vectors()


def token() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        random(ROWS, HEADS, 1, DIM, seed=3),
        random(ROWS, KV_HEADS, 1, DIM, seed=4),
        random(ROWS, KV_HEADS, 1, DIM, seed=5),
    )
    return q, k + MEAN[:, None], v


@pytest.mark.parametrize("bits", [8, 4])
def test_whole_keys_are_near_what_was_stored(bits: int) -> None:
    keys, _ = whole(buffers(bits), bits)
    expected = random(ROWS, KV_HEADS, SLOTS, DIM, seed=1) + MEAN[:, None]
    assert float((keys - expected).abs().max()) < {8: 0.03, 4: 0.5}[bits]


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("bits", [8, 4])
def test_decode(bits: int, form: str) -> None:
    (q, k, v), held, slot = token(), buffers(bits), torch.tensor([3, 7])
    mask = torch.zeros(ROWS, 1, 1, SLOTS)
    mask[..., -2:] = float("-inf")
    out = torch.ops.xkv.decode_coded(q, k, v, *held, slot, mask, SCALE, bits, bits, key_mean=MEAN, **FORMS[form])
    coding, row = Coding.of_bits(bits, DIM), torch.arange(ROWS)
    for got, expected in zip(held[:2], coding.encode(k - MEAN[:, None]), strict=True):
        assert torch.equal(got[row, :, slot], expected[:, :, 0])
    keys, values = whole(held, bits)
    at = slot[:, None, None, None]
    taken = keys.take_along_dim(at, 2), values.take_along_dim(at, 2)
    expected = torch.ops.xkv.decode_attention(q, *taken, keys, values, slot, mask, SCALE, **FORMS[form])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", list(FORMS))
def test_decode_scored(form: str) -> None:
    (q, k, v), held, slot = token(), buffers(8), torch.tensor([[3, 7, 0], [1, 1, 4]])
    mask, seen = torch.zeros(ROWS, 1, 1, SLOTS), torch.tensor([11, 9])
    states = [
        [torch.zeros(ROWS, KV_HEADS, SLOTS, dtype=torch.int32), torch.zeros(ROWS, KV_HEADS, SLOTS)] for _ in range(2)
    ]
    args = (slot, mask, seen, SCALE)
    out = torch.ops.xkv.decode_coded_scored(q, k, v, *held, *states[0], *args, 8, 8, key_mean=MEAN, **FORMS[form])
    keys, values = whole(held, 8)
    at = slot[..., None, None]
    taken = keys.take_along_dim(at, 2), values.take_along_dim(at, 2)
    expected = torch.ops.xkv.decode_scored(q, *taken, keys, values, *states[1], *args, **FORMS[form])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("op", [torch.ops.xkv.extend_coded, extend_of_any_length], ids=["op", "any length"])
def test_extend_merges_slots_and_new_tokens(op: Any, bits: int, form: str) -> None:
    q, k, v = (random(ROWS, heads, NEW, DIM, seed=6 + heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
    k, held = k + MEAN[:, None], buffers(bits)
    mask = torch.arange(SLOTS)[None, None, None] < torch.tensor([SLOTS, 4])[:, None, None, None]
    out = op(q, k, v, *held, mask, SCALE, bits, bits, key_mean=MEAN, **FORMS[form])
    expected = torch.ops.xkv.extend_attention(q, k, v, *whole(held, bits), mask, SCALE, **FORMS[form])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_without_its_mean_a_merge_would_be_wrong() -> None:
    """The sum of exponentials of the slots knows the mean, though a softmax over them alone does not."""
    q, k, v = (random(ROWS, heads, NEW, DIM, seed=6 + heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
    mask = torch.ones(1, 1, 1, SLOTS, dtype=torch.bool)
    given = (q, k + MEAN[:, None], v, *buffers(8), mask, SCALE, 8, 8)
    with_mean, without = torch.ops.xkv.extend_coded(*given, key_mean=MEAN), torch.ops.xkv.extend_coded(*given)
    assert float((with_mean - without).abs().max()) > 0.1


@pytest.mark.parametrize("bits", [8, 4])
def test_keep_writes_the_codes_of_what_is_left_of_keys(bits: int) -> None:
    k, v = random(ROWS, KV_HEADS, NEW, DIM, seed=3) + MEAN[:, None], random(ROWS, KV_HEADS, NEW, DIM, seed=4)
    held, before = buffers(bits), buffers(bits)
    capacity = 4
    source = torch.tensor([0, 2, SLOTS, SLOTS + 3]).expand(ROWS, KV_HEADS, capacity)
    placed = torch.zeros(ROWS, KV_HEADS, SLOTS, dtype=torch.int32)
    torch.ops.xkv.keep_coded(
        k, v, source, placed, *held, torch.zeros_like(placed), capacity, bits, bits, False, key_mean=MEAN
    )
    coding = Coding.of_bits(bits, DIM)
    new = [*coding.encode(k - MEAN[:, None]), *coding.encode(v)]
    for got, old, arrived in zip(held, before, new, strict=True):
        assert torch.equal(got[:, :, :capacity], torch.cat((old[:, :, [0, 2]], arrived[:, :, [0, 3]]), 2))
