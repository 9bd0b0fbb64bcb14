"""Attention over slots that are stored in fewer bits. Codes are widened a tile of slots at a time: no dequantized copy
of a cache is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from xkv_fx.runtime.attention import (
    BLOCK,
    causal_attention,
    distance_bias,
    merge_attention,
    soft_cap,
    without_slots,
)
from xkv_fx.runtime.form import AttentionForm
from xkv_fx.runtime.quantize import Coding, rotate, rotate_back

TILE = 512
"""Slots that are widened at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """The keys or the values that a layer's slots hold.

    Attributes:
        cache: codes uint8 `[rows, kv_heads, slots, code_bytes]`; the vectors themselves where there is no coding.
        scales: float16 `[rows, kv_heads, slots, groups, 2]`, scales and zeros; `[..., 1, 1]` of floats; no groups where
            there is no coding.
        coding: how they are stored; None for the model's dtype.
        mean: float32 `[kv_heads, dim]`, what is subtracted from vectors before they are stored; None for nothing.
    """

    cache: Tensor
    scales: Tensor
    coding: Coding | None
    mean: Tensor | None = None

    @classmethod
    def of(cls, cache: Tensor, scales: Tensor, bits: int, dim: int, mean: Tensor | None = None) -> Stored:
        """From an op's arguments; `bits` is 0 for the model's dtype. Floats are known by their scales without zeros."""
        return cls(cache, scales, Coding.of_bits(bits, dim, floats=scales.shape[-1] == 1) if bits else None, mean)

    @classmethod
    def pair(
        cls, buffers: Sequence[Tensor], bits: tuple[int, int], dims: tuple[int, int], key_mean: Tensor | None = None
    ) -> tuple[Stored, Stored]:
        """Keys and values. Where values are the keys and stored once, their buffer is empty and these are the keys.

        Args:
            buffers: of an op, `k_cache, k_scales, v_cache, v_scales`.
            bits, dims: of keys and of values.
            key_mean: see `mean`.
        """
        keys = cls.of(buffers[0], buffers[1], bits[0], dims[0], key_mean)
        return keys, cls.of(buffers[2], buffers[3], bits[1], dims[1]) if buffers[2].shape[-1] else keys

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the vectors, `[rows, kv_heads, slots, dim]`."""
        rows, kv_heads, slots = self.cache.shape[:3]
        return rows, kv_heads, slots, self.dim

    @property
    def slots(self) -> int:
        return self.cache.shape[2]

    @property
    def bits(self) -> int:
        """Of an element, as ops take them; 0 for the model's dtype."""
        return 0 if self.coding is None else self.coding.bits

    @property
    def dim(self) -> int:
        """Elements of a vector."""
        return self.cache.shape[3] if self.coding is None else self.coding.dim

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """What is stored of `TILE` slots at a time, float32 `[rows, kv_heads, TILE, dim]`: rotated where coded, and
        without the mean."""
        for start in range(0, self.slots, TILE):
            part = slice(start, min(start + TILE, self.slots))
            if self.coding is None:
                yield part, self.cache[:, :, part].float()
            else:
                yield part, self.coding.decode(self.cache[:, :, part], self.scales[:, :, part])

    def encode(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """What is stored of vectors `[..., kv_heads, N, dim]`: for the cache, and where they are coded for the scales.
        The mean is taken off in their dtype."""
        rest = vectors if self.mean is None else vectors - self.mean[:, None].to(vectors.dtype)
        return (rest,) if self.coding is None else self.coding.encode(rest)

    def write(self, vectors: Tensor, at: tuple[Tensor, ...]) -> None:
        """Store vectors `[rows, kv_heads, dim]` in slots, in place.

        Args:
            at: indices of the slots along the first three axes.
        """
        parts = self.encode(vectors[:, :, None])
        for buffer, part in zip((self.cache, self.scales), parts, strict=False):  # no scales without codes
            buffer.index_put_(at, part[:, :, 0])

    def vector_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The vectors themselves, `TILE` slots at a time, float32 `[rows, kv_heads, TILE, dim]`."""
        for part, tile in self.tiles():
            whole = tile if self.coding is None else rotate_back(tile)
            yield part, whole if self.mean is None else whole + self.mean[:, None]

    def vectors(self) -> Tensor:
        """All vectors at once, float32 `[rows, kv_heads, slots, dim]`: for callers that need whole keys or values."""
        return torch.cat([tile for _, tile in self.vector_tiles()], 2)


def held_keys(
    cache: Tensor | None, scales: Tensor | None, bits: int, dim: int, mean: Tensor | None
) -> Tensor | Stored | None:
    """Keys as an op takes them: None, those of a cache in the model's dtype, or `Stored` where there are scales."""
    return cache if cache is None or scales is None else Stored.of(cache, scales, bits, dim, mean)


def logits_of(q: Tensor, keys: Stored, scale: float, softcap: float | None = None) -> Tensor:
    """Logits float32 `[rows, kv_heads, group, S, slots]` of queries `[rows, query_heads, S, key_dim]`. The mean key
    adds the same to all logits of a query, which matters before a softcap, and where they meet others."""
    rows, heads, length, dim = q.shape
    kv_heads = keys.cache.shape[1]
    grouped = q.float().reshape(rows, kv_heads, heads // kv_heads * length, dim)
    asking = grouped if keys.coding is None else rotate(grouped)
    parts = [torch.matmul(asking, tile.transpose(-1, -2)) for _, tile in keys.tiles()]
    logits = torch.cat(parts, -1)
    if keys.mean is not None:
        logits = logits + torch.matmul(grouped, keys.mean[..., None])
    return soft_cap(logits * scale, softcap).view(rows, kv_heads, -1, length, keys.slots)


def weighted(weights: Tensor, values: Stored) -> Tensor:
    """The sum of values by weights `[rows, kv_heads, group, S, slots]`, float32 `[rows, query_heads, S, value_dim]`."""
    flat = weights.flatten(2, 3)
    parts = [torch.matmul(flat[..., part], tile) for part, tile in values.tiles()]
    out = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    out = out if values.coding is None else rotate_back(out)
    if values.mean is not None:
        out = out + flat.sum(-1, keepdim=True) * values.mean[:, None]
    return out.view(*weights.shape[:4], values.dim).flatten(1, 2)


def attend(
    q: Tensor,
    keys: Stored,
    values: Stored,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to the slots by an additive mask.

    Args:
        mask: broadcastable to `[rows, kv_heads, group, S, slots]`; 0, minus infinity, or a bias.

    Returns:
        float32 `[rows, query_heads, S, value_dim]`, 0 for a query without any slot; the weights
        `[rows, kv_heads, group, S, slots]`; and the log-sum-exp `[rows, query_heads, S]`.
    """
    logits = logits_of(q, keys, scale, softcap) + mask
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return weighted(weights, values), weights, lse.flatten(1, 2)


def extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Stored,
    values: Stored,
    mask: Tensor,
    form: AttentionForm,
    ages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `xkv::extend_attention` without sink logits: output in q's dtype, and log-sum-exp."""
    among_new = causal_attention(q, k, v, dataclasses.replace(form, sink_logits=None))
    outs, lses = [], []
    for start in range(0, q.shape[2], BLOCK):
        part = q[:, :, start : start + BLOCK]
        query = torch.arange(start, start + part.shape[2], device=q.device)
        out, lse = extend_block(part, query, keys, values, mask, form, ages)
        outs.append(out)
        lses.append(lse)
    over_slots = torch.cat(outs, 2), torch.cat(lses, 2)
    return merge_attention(among_new, without_slots(over_slots, q, k, mask))


def extend_block(
    q: Tensor,
    query: Tensor,
    keys: Stored,
    values: Stored,
    mask: Tensor,
    form: AttentionForm,
    ages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A block of queries over the slots: output in q's dtype and log-sum-exp.

    Args:
        query: int64 `[S]`, the places of these queries among the new tokens.
        mask: bool `[rows, kv_heads or 1, S of all or 1, slots]`.
        ages: int64 `[rows, kv_heads, slots]`, the distance of each slot's token from the first query; with slopes.
    """
    seen = mask if mask.shape[2] == 1 else mask.index_select(2, query)
    added = torch.zeros((), device=q.device).masked_fill(~seen[:, :, None], float("-inf"))
    if form.slopes is not None and ages is not None:
        added = added + distance_bias(form.slopes, ages[:, :, None] + query[:, None])
    out, _, lse = attend(q, keys, values, added, form.scale, form.softcap)
    return out.to(q.dtype), lse
