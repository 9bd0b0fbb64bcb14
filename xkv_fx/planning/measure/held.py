"""What a layer holds after its prefill, and attention of forced continuations over it, many of them at once.

Survivors are chosen by the very function that serves, and what a decoded token may attend to follows from `SlotPlan`,
so that all tokens of a continuation can be run in one pass and come out as if they had been decoded one by one.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xkv_fx.formats import LayerFormats, SlotFormat
from xkv_fx.mean_keys import MeanKey
from xkv_fx.runtime.attention import apply_sink_logits, causal_attention, merge_attention, slot_attention
from xkv_fx.runtime.form import AttentionForm
from xkv_fx.runtime.quantize import Coding, mean_tensor
from xkv_fx.runtime.selection import write_survivors
from xkv_fx.runtime.slots import EMPTY, SlotPlan

Heads = tuple[int, ...] | None
"""Some of a layer's KV heads; None for all of them."""


@dataclasses.dataclass(frozen=True)
class LayerRun:
    """What one layer computed for a prompt of S tokens.

    Attributes:
        k, v: `[1, kv_heads, S, key_dim or value_dim]`, keys rotated.
        scores: what survivors are chosen by, float32 `[1, kv_heads, S]`.
        form: of its attention.
    """

    k: Tensor
    v: Tensor
    scores: Tensor
    form: AttentionForm

    def of_heads(self, heads: Heads) -> LayerRun:
        """The same of some of the KV heads."""
        if heads is None:
            return self
        chosen, sinks = list(heads), self.form.sink_logits
        if sinks is not None:
            sinks = sinks.view(self.k.shape[1], -1)[chosen].flatten()
        k, v, scores = (part[:, chosen] for part in (self.k, self.v, self.scores))
        return LayerRun(k, v, scores, dataclasses.replace(self.form, sink_logits=sinks))


@dataclasses.dataclass(frozen=True)
class Held:
    """K/V of a prompt that a layer holds, and what each of the next T tokens reaches.

    Attributes:
        k, v: `[1, kv_heads, N, ...]`.
        reach: which of the N each token attends to, bool `[1, kv_heads or 1, T, N]`; None for all of them.
        among: which of the T tokens each attends to, bool `[1, kv_heads or 1, T, T]`; None for itself and all before.
    """

    k: Tensor
    v: Tensor
    reach: Tensor | None
    among: Tensor | None


@dataclasses.dataclass(frozen=True)
class HeldScored:
    """Buffers of a layer that evicts by accumulated attention (`eviction="scored"`), as prefill left them."""

    k: Tensor
    v: Tensor
    positions: Tensor
    scores: Tensor
    plan: SlotPlan


@dataclasses.dataclass(frozen=True)
class Storing:
    """How a layer stores its tokens in fewer bits.

    Attributes:
        formats: of keys and of values.
        mean_key: what is subtracted from keys that are stored in fewer bits; None for nothing.
        mean_value: the same for values: the mean key where they are the keys, as with latents.
    """

    formats: LayerFormats
    mean_key: MeanKey | None = None
    mean_value: MeanKey | None = None

    def of_heads(self, heads: Heads) -> Storing:
        """The same for some of the KV heads."""
        if heads is None:
            return self
        key, value = (None if mean is None else mean.of_heads(heads) for mean in (self.mean_key, self.mean_value))
        return Storing(self.formats, key, value)


def as_stored(k: Tensor, v: Tensor, storing: Storing | None) -> tuple[Tensor, Tensor]:
    """Keys and values `[..., kv_heads, N, dim]` as a layer's slots give them back. Each slot is stored by itself, so it
    does not matter whether survivors are chosen before or after."""
    if storing is None:
        return k, v
    keys, values = storing.formats
    return _passed(k, keys, storing.mean_key), _passed(v, values, storing.mean_value)


def _passed(vectors: Tensor, name: SlotFormat, mean_vector: MeanKey | None) -> Tensor:
    if name == "model":
        return vectors
    coding = Coding.of(name, vectors.shape[-1])
    if mean_vector is None:
        return coding.passed(vectors)
    mean = mean_tensor(mean_vector, vectors.dtype, vectors.device)[:, None]
    return (coding.passed((vectors - mean.to(vectors.dtype)).float()) + mean).to(vectors.dtype)


def hold_all(run: LayerRun, tokens: int) -> Held:
    """The full cache: every token that the layer's sliding window reaches."""
    window = run.form.sliding_window
    if window is None:
        return Held(run.k, run.v, None, None)
    length = run.k.shape[2]
    query = length + torch.arange(tokens, device=run.k.device)[:, None]
    inside = torch.arange(length + tokens, device=run.k.device) > query - window
    among = inside[:, length:] & torch.ones_like(inside[:, length:]).tril()
    return Held(run.k, run.v, inside[None, None, :, :length], among[None, None])


def hold(run: LayerRun, plan: SlotPlan, tokens: int) -> Held | HeldScored:
    """What the layer holds under `plan`, whose slots must have room for `tokens` more where they are appended."""
    length = run.k.shape[2]
    shape = (1, run.k.shape[1], plan.slots)
    k = run.k.new_zeros((*shape, run.k.shape[3]))
    v = run.v.new_zeros((*shape, run.v.shape[3]))
    positions = torch.zeros(shape, dtype=torch.int32, device=k.device)
    zero = torch.zeros(1, dtype=torch.int64, device=k.device)
    counted = zero + length
    scores = write_survivors(run.k, run.v, run.scores, counted, zero, zero, k, v, positions, plan, fresh=True)
    if plan.eviction == "scored":
        return HeldScored(k, v, positions, scores, plan)
    used = min(length, plan.capacity)
    k, v = k[:, :, :used].contiguous(), v[:, :, :used].contiguous()
    if plan.eviction in ("append", "none") and plan.sliding_window is None:
        return Held(k, v, None, None)
    reach, among = _reach(plan, positions, length, tokens)
    return Held(k, v, _one_head(reach[:, :, :used]), _one_head(among))


def _reach(plan: SlotPlan, positions: Tensor, length: int, tokens: int) -> tuple[Tensor, Tensor]:
    """For each of the next `tokens` tokens, once it has taken its slot: which slots still hold what prefill wrote and
    are in reach, bool `[T, kv_heads, slots]`, and which new tokens are, bool `[T, kv_heads, T]`."""
    seen = length + 1 + torch.arange(tokens, device=positions.device)
    base = torch.full_like(seen, length)
    at_first = plan.ordinals(positions, base[:1], base[:1])
    now = plan.ordinals(positions.expand(tokens, -1, -1), seen, base)
    in_reach = now != EMPTY
    if plan.sliding_window is not None:
        in_reach &= now > (seen - 1 - plan.sliding_window)[:, None, None]
    reach = in_reach & (now == at_first)
    new = now - length
    among = torch.zeros((*now.shape[:2], tokens + 1), dtype=torch.bool, device=positions.device)
    among.scatter_(2, torch.where(in_reach & (new >= 0), new, tokens), True)
    return reach, among[:, :, :tokens]


def _one_head(mask: Tensor) -> Tensor:
    """`[T, kv_heads, N]` -> `[1, kv_heads or 1, T, N]`, one head where all are alike."""
    heads = mask.transpose(0, 1)[None]
    return heads[:, :1].contiguous() if bool((heads == heads[:, :1]).all()) else heads.contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, held: Held | HeldScored, run: LayerRun) -> Tensor:
    """Attention of R continuations of T tokens each over what their layer holds and over themselves.

    Args:
        q, k, v: `[R, query_heads or kv_heads, T, ...]`.

    Returns:
        `[R, query_heads, T, value_dim]`.
    """
    if isinstance(held, HeldScored):
        return _decode_each(q, k, v, held, run)
    if held.among is None:
        among = causal_attention(q, k, v, dataclasses.replace(run.form, sliding_window=None, sink_logits=None))
    else:
        among = slot_attention(q, k, v, held.among, run.form)
    out, lse = merge_attention(among, _over_held(q, held, run))
    return apply_sink_logits(out, lse, run.form.sink_logits)


def _over_held(q: Tensor, held: Held, run: LayerRun) -> tuple[Tensor, Tensor]:
    """Where every query reaches all, continuations and query heads of one KV head are folded into one long query."""
    rows, heads, tokens, dim = q.shape
    if held.reach is not None:
        k, v = held.k.expand(rows, -1, -1, -1), held.v.expand(rows, -1, -1, -1)
        return slot_attention(q, k, v, held.reach, run.form)
    kv_heads = held.k.shape[1]
    folded = q.reshape(rows, kv_heads, -1, dim).transpose(0, 1).reshape(1, kv_heads, -1, dim)
    everything = torch.ones(1, 1, 1, held.k.shape[2], dtype=torch.bool, device=q.device)
    out, lse = slot_attention(folded, held.k, held.v, everything, run.form)
    out = out.reshape(kv_heads, rows, -1, out.shape[-1]).transpose(0, 1).reshape(rows, heads, tokens, -1)
    return out, lse.reshape(kv_heads, rows, -1).transpose(0, 1).reshape(rows, heads, tokens)


def _decode_each(q: Tensor, k: Tensor, v: Tensor, held: HeldScored, run: LayerRun) -> Tensor:
    """One token after another through the op that serves: what is evicted depends on the attention itself."""
    rows, plan = q.shape[0], held.plan
    k_cache, v_cache, positions, scores = (
        part.repeat(rows, *(1,) * (part.dim() - 1)) for part in (held.k, held.v, held.positions, held.scores)
    )
    seen = torch.full((rows,), run.k.shape[2], dtype=torch.int64, device=q.device)
    outs = []
    for token in range(q.shape[2]):
        one = (part[:, :, token : token + 1].contiguous() for part in (q, k, v))
        now = seen + token
        slot = plan.evicted_slot(positions, scores, now)
        valid = plan.decode_mask(plan.with_token(positions, slot, now), now, now)
        mask = torch.zeros(valid.shape, dtype=q.dtype, device=q.device).masked_fill_(~valid, float("-inf"))
        outs.append(
            torch.ops.xkv.decode_scored(
                *one, k_cache, v_cache, positions, scores, slot, mask, now, run.form.scale, run.form.softcap,
                run.form.sink_logits,
            )
        )  # fmt: skip
    return torch.cat(outs, 2)
