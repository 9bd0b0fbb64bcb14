"""The budgeted ops over slots of fewer bits, under the `torch.library` namespace `xkv`; importing this registers them.

They are the ops of `ops`, with two buffers for keys and two for values, in place of one each: codes uint8
`[rows, kv_heads, slots, code_bytes]` and scales float16 `[rows, kv_heads, slots, groups, 2]`, or `[..., 1, 1]` for
codes that are floats. `key_bits` and `value_bits` are 8 or 4; with 0 that part is stored in the model's dtype, and its
scales have no groups. Where the values are the keys themselves, as with an MLA latent, they are stored once and
`v_cache` is `[rows, kv_heads, slots, 0]`. `key_mean`, float32 `[kv_heads, key_dim]`, is subtracted from keys before
they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xkv_fx.runtime.attention import apply_sink_logits, empty_output
from xkv_fx.runtime.coded import Stored, attend, extend
from xkv_fx.runtime.form import AttentionForm


def _keep(
    k: Tensor,
    v: Tensor,
    source: Tensor,
    placed: Tensor,
    k_cache: Tensor,
    k_scales: Tensor,
    v_cache: Tensor,
    v_scales: Tensor,
    positions: Tensor,
    capacity: int,
    key_bits: int,
    value_bits: int,
    fresh: bool,
    key_mean: Tensor | None = None,
) -> None:
    """`xkv::keep`: what a slot holds already is moved as it is, and what is new is stored once."""
    slots = positions.shape[2]
    buffers, bits = (k_cache, k_scales, v_cache, v_scales), (key_bits, value_bits)
    keys, values = Stored.pair(buffers, bits, (k.shape[-1], v.shape[-1]), key_mean)
    arrived = (source - slots).clamp(min=0)
    for stored, new in ((keys, k),) if values is keys else ((keys, k), (values, v)):
        # of a prompt, what is kept is encoded; of a turn, which is mostly shorter than what is kept, what is new
        made = stored.encode(_taken(new, arrived)) if fresh else (_taken(part, arrived) for part in stored.encode(new))
        for buffer, part in zip((stored.cache, stored.scales), made, strict=False):  # no scales without codes
            if not fresh:
                held = _taken(buffer, source.clamp(max=slots - 1))
                part = torch.where(_along(source < slots, buffer), held, part)
            buffer[:, :, :capacity].copy_(part)
    positions.copy_(placed)


def _taken(tokens: Tensor, which: Tensor) -> Tensor:
    """Some of the tokens `[rows, kv_heads, N, ...]` of each head, by their indices `[rows, kv_heads, count]`."""
    return tokens.gather(2, _along(which, tokens).expand(*which.shape, *tokens.shape[3:]))


def _along(numbers: Tensor, tokens: Tensor) -> Tensor:
    """Numbers `[rows, kv_heads, count]`, one a token, with as many axes as the tokens have."""
    return numbers.view(*numbers.shape, *(1,) * (tokens.dim() - 3))


keep_coded = torch.library.custom_op(
    "xkv::keep_coded", _keep, mutates_args=("k_cache", "k_scales", "v_cache", "v_scales", "positions")
)
keep_coded.register_fake(lambda *args, **kwargs: None)


@torch.library.custom_op("xkv::extend_coded", mutates_args=())
def extend_coded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    k_scales: Tensor,
    v_cache: Tensor,
    v_scales: Tensor,
    mask: Tensor,
    scale: float,
    key_bits: int,
    value_bits: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
    ages: Tensor | None = None,
    key_mean: Tensor | None = None,
) -> Tensor:
    """`xkv::extend_attention`. The new tokens attend to each other as they are, to the slots as these are stored."""
    form = AttentionForm(scale, sliding_window, softcap, slopes=slopes)
    buffers, bits = (k_cache, k_scales, v_cache, v_scales), (key_bits, value_bits)
    keys, values = Stored.pair(buffers, bits, (k.shape[-1], v.shape[-1]), key_mean)
    out, lse = extend(q, k, v, keys, values, mask, form, ages)
    return apply_sink_logits(out, lse, sink_logits).contiguous()


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    k_scales: Tensor,
    v_cache: Tensor,
    v_scales: Tensor,
    slot: Tensor,
    mask: Tensor,
    scale: float,
    key_bits: int,
    value_bits: int,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    key_mean: Tensor | None = None,
) -> Tensor:
    """`xkv::decode_attention`: the token is stored first, then attended to as it is stored."""
    keys, values, _ = _written(k, v, (k_cache, k_scales, v_cache, v_scales), slot, key_bits, value_bits, key_mean)
    out, _ = _attended(q, keys, values, mask, scale, softcap, sink_logits)
    return out


decode_coded = torch.library.custom_op(
    "xkv::decode_coded", _decode, mutates_args=("k_cache", "k_scales", "v_cache", "v_scales")
)


def _decode_scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    k_scales: Tensor,
    v_cache: Tensor,
    v_scales: Tensor,
    positions: Tensor,
    scores: Tensor,
    slot: Tensor,
    mask: Tensor,
    seen: Tensor,
    scale: float,
    key_bits: int,
    value_bits: int,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    key_mean: Tensor | None = None,
) -> Tensor:
    """`xkv::decode_scored`, the token being stored first."""
    buffers = (k_cache, k_scales, v_cache, v_scales)
    keys, values, at = _written(k, v, buffers, slot, key_bits, value_bits, key_mean)
    positions.index_put_(at, seen[:, None].expand_as(slot).to(positions.dtype))
    scores.index_put_(at, torch.zeros_like(slot, dtype=scores.dtype))
    out, attention = _attended(q, keys, values, mask, scale, softcap, sink_logits)
    scores.add_(attention)
    return out


decode_coded_scored = torch.library.custom_op(
    "xkv::decode_coded_scored",
    _decode_scored,
    mutates_args=("k_cache", "k_scales", "v_cache", "v_scales", "positions", "scores"),
)


def _written(
    k: Tensor,
    v: Tensor,
    buffers: tuple[Tensor, Tensor, Tensor, Tensor],
    slot: Tensor,
    key_bits: int,
    value_bits: int,
    key_mean: Tensor | None,
) -> tuple[Stored, Stored, tuple[Tensor, Tensor, Tensor]]:
    """What the slots hold once the token is in them, and the indices of its slots."""
    rows, kv_heads = k.shape[:2]
    row, head = torch.arange(rows, device=k.device)[:, None], torch.arange(kv_heads, device=k.device)
    at = (row, head, slot.view(rows, -1))
    keys, values = Stored.pair(buffers, (key_bits, value_bits), (k.shape[-1], v.shape[-1]), key_mean)
    keys.write(k[:, :, 0], at)
    if values is not keys:
        values.write(v[:, :, 0], at)
    return keys, values, at


def _attended(
    q: Tensor,
    keys: Stored,
    values: Stored,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The attention of one token a row, and what each slot is paid, float32 `[rows, kv_heads, slots]`."""
    rows, kv_heads = keys.cache.shape[:2]
    alike = mask.shape[1] in (1, kv_heads)
    mask = mask if alike else mask.reshape(rows, kv_heads, -1, mask.shape[-1])
    out, weights, lse = attend(q, keys, values, mask[:, :, :, None], scale, softcap)
    paid = apply_sink_logits(weights[:, :, :, 0].flatten(1, 2)[:, :, None], lse, sink_logits)
    out = apply_sink_logits(out, lse, sink_logits)
    return out.to(q.dtype), paid.view(rows, kv_heads, -1, keys.slots).mean(2)


for _op in (extend_coded, decode_coded, decode_coded_scored):
    _op.register_fake(empty_output)

CODED_DECOMPOSITIONS: dict[Any, Callable[..., Tensor | None]] = {
    torch.ops.xkv.keep_coded.default: _keep,
    torch.ops.xkv.decode_coded.default: _decode,
    torch.ops.xkv.decode_coded_scored.default: _decode_scored,
}
"""As `ops.DECOMPOSITIONS`."""
