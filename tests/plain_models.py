"""Small decoders in plain PyTorch, each with its own way of writing attention; weights are random."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, HEAD_DIM, POSITIONS = 61, 32, 4, 8, 96
SLIDING_WINDOW = 8
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`q, k, v [rows, heads, S, head_dim]` -> `[rows, heads, S, head_dim]`."""


def causal_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_bool_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(q.shape[2]), scale=0.3)


def sdpa_sliding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position = torch.arange(q.shape[2])
    distance = position[:, None] - position[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < SLIDING_WINDOW))


def sdpa_alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position = torch.arange(q.shape[2])
    slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1)
    bias = slopes[:, None, None] * (position[None] - position[:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(~causal_mask(q.shape[2]), float("-inf")))


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores.masked_fill(~causal_mask(q.shape[2]), float("-inf")), -1) @ v


def added_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], q.shape[2]).masked_fill(~causal_mask(q.shape[2]), torch.finfo(q.dtype).min)
    weights = F.softmax(torch.matmul(q * 0.4, k.mT) + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, 0.5, training=False), v)


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads laid behind one another, with `bmm`."""
    queries, keys, values = (tensor.reshape(-1, *tensor.shape[2:]) for tensor in (q, k, v))
    scores = torch.bmm(queries, keys.transpose(1, 2)) * q.shape[-1] ** -0.5
    scores = torch.where(causal_mask(q.shape[2]), scores, torch.tensor(-1e9))
    return torch.bmm(scores.softmax(-1), values).view(q.shape)


def rotary_counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Angles made from the length alone."""
    half = q.shape[-1] // 2
    angles = torch.arange(q.shape[2])[:, None] * 0.3 ** torch.arange(half)
    cos, sin = angles.cos(), angles.sin()

    def rotated(x: Tensor) -> Tensor:
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    return F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)


# What is no causal attention over K/V


def bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first three tokens see one another."""
    mask = causal_mask(q.shape[2]) | (torch.arange(q.shape[2]) < 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def dilated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position = torch.arange(q.shape[2])
    distance = position[:, None] - position[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance % 2 == 0))


def bent_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position = torch.arange(q.shape[2])
    bias = -((position[:, None] - position[None]).clamp(min=0).float() ** 0.5)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(~causal_mask(q.shape[2]), float("-inf")))


def late_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A sliding window that no short prompt shows."""
    position = torch.arange(q.shape[2])
    distance = position[:, None] - position[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & ((distance < 70) | (distance == 75)))


def by_content(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = causal_mask(q.shape[2]) & (k[:, :, None, :, 0] > 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen | torch.eye(q.shape[2], dtype=torch.bool))


def content_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT + k.sum(-1)[:, :, None]
    return torch.softmax(scores.masked_fill(~causal_mask(q.shape[2]), float("-inf")), -1) @ v


def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT) ** 2
    return torch.softmax(scores.masked_fill(~causal_mask(q.shape[2]), float("-inf")), -1) @ v


def random_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)


class Attention(nn.Module):
    def __init__(self, attend: Attend, kv_heads: int, interleave: bool) -> None:
        super().__init__()
        self.attend, self.kv_heads, self.interleave = attend, kv_heads, interleave
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.k = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.v = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (part(x).view(rows, length, -1, HEAD_DIM).transpose(1, 2) for part in (self.q, self.k, self.v))
        group = HEADS // self.kv_heads
        if group > 1 and self.interleave:
            k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
        elif group > 1:
            k, v = (
                tensor[:, :, None].expand(-1, -1, group, -1, -1).reshape(rows, HEADS, length, HEAD_DIM)
                for tensor in (k, v)
            )
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(rows, length, -1))  # type: ignore[no-any-return]


class AttendsTwice(nn.Module):
    """The difference of two attentions, over the same keys and values or with these exchanged."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.parts = nn.ModuleList(nn.Linear(WIDTH, HEADS * HEAD_DIM) for _ in range(4))
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v, r = (part(x).view(rows, length, -1, HEAD_DIM).transpose(1, 2) for part in self.parts)
        difference = sdpa(q, k, v) - 0.5 * (sdpa(r, k, v) if self.shared else sdpa(r, v, k))
        out: Tensor = self.out(difference.transpose(1, 2).reshape(rows, length, -1))
        return out


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention` with a mask; it works out its weights or not."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        mask = ~causal_mask(x.shape[1])
        out: Tensor = self.inner(x, x, x, attn_mask=mask, need_weights=self.need_weights)[0]
        return out


class Decoder(nn.Module):
    """Two layers behind learned positions, which it is given or counts itself.

    Args:
        attention: makes the attention module of a layer.
        counted: leave `position_ids` alone and count positions from the length.
        mix: something between the layers that mixes tokens.
    """

    def __init__(
        self, attention: Callable[[], nn.Module], counted: bool = False, mix: nn.Module | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.attentions = nn.ModuleList(attention() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH)) for _ in range(2)
        )
        self.drop, self.counted, self.mix = nn.Dropout(0.2), counted, mix
        self.head = nn.Linear(WIDTH, VOCABULARY)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1]) if self.counted else position_ids
        x = self.drop(self.tokens(input_ids) + self.places(places))
        for layer, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * layer](x))
            x = x + self.drop(mlp(self.norms[2 * layer + 1](x)))
            if self.mix is not None:
                x = self.mix(x)
        logits: Tensor = self.head(x)
        return logits


def decoder(attend: Attend, kv_heads: int = HEADS, interleave: bool = False, counted: bool = False) -> Decoder:
    return Decoder(lambda: Attention(attend, kv_heads, interleave), counted)


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def example(length: int = 12) -> tuple[Tensor, Tensor]:
    return random_ids(1, length), torch.arange(length)[None]


@torch.no_grad()
def greedy_by_recomputing(model: nn.Module, ids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens `[rows, S + steps]` without any cache, and their logits `[rows, steps, vocabulary]`."""
    logits = []
    for _ in range(steps):
        positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
        logits.append(model(ids, positions)[:, -1])
        ids = torch.cat((ids, logits[-1].argmax(-1, keepdim=True)), 1)
    return ids, torch.stack(logits, 1)
