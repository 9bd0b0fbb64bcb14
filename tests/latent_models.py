"""Small models whose layers make keys and values from a latent: DeepSeek-V3's, and a decoder in plain PyTorch in which
each layer does so in its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_models import build
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

VOCABULARY, WIDTH, HEADS, RANK, NOPE, ROPE, VALUE = 61, 32, 4, 12, 6, 4, 5
Expand = Callable[["LatentAttention", Tensor, Tensor], tuple[Tensor, Tensor]]
"""A latent `[rows, S, rank]` and rotary keys `[rows, S, rope]` -> keys and values `[rows, heads, S, ...]`."""


def _by_head(self: LatentAttention, latent: Tensor) -> tuple[Tensor, Tensor]:
    made = self.kv(latent).unflatten(2, (HEADS, NOPE + VALUE)).transpose(1, 2)
    return made.split((NOPE, VALUE), 3)  # type: ignore[return-value]


def _for_all(rotary: Tensor) -> Tensor:
    return rotary[:, None].expand(-1, HEADS, -1, -1)


def joined(self: LatentAttention, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    nope, values = _by_head(self, latent)
    return torch.cat((nope, _for_all(rotary)), 3), values


def filled(self: LatentAttention, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers does it."""
    nope, values = _by_head(self, latent)
    keys = nope.new_empty(*nope.shape[:3], NOPE + ROPE)
    keys[..., :NOPE].copy_(nope)
    keys[..., NOPE:].copy_(rotary[:, None])
    return keys, values


def rotary_first(self: LatentAttention, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    nope, values = _by_head(self, latent)
    return torch.cat((_for_all(rotary), nope), 3), values


def values_first(self: LatentAttention, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a head's values come before those of its keys."""
    made = self.kv(latent).unflatten(2, (HEADS, NOPE + VALUE)).transpose(1, 2)
    return torch.cat((made[..., VALUE:], _for_all(rotary)), 3), made[..., :VALUE]


def two_maps(self: LatentAttention, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    nope = self.k(latent).unflatten(2, (HEADS, NOPE)).transpose(1, 2)
    values = self.v(latent).unflatten(2, (HEADS, VALUE)).transpose(1, 2)
    return torch.cat((nope, _for_all(rotary)), 3), values


def without_rotary(self: LatentAttention, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    made = self.wide(latent).unflatten(2, (HEADS, NOPE + ROPE + VALUE)).transpose(1, 2)
    return made[..., : NOPE + ROPE], made[..., NOPE + ROPE :]


def with_bias(self: LatentAttention, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    made = self.biased(latent).unflatten(2, (HEADS, NOPE + VALUE)).transpose(1, 2)
    return torch.cat((made[..., :NOPE], _for_all(rotary)), 3), made[..., NOPE:]


def rotary_by_head(self: LatentAttention, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Not every head has the same rotary key."""
    nope, values = _by_head(self, latent)
    return torch.cat((nope, torch.stack((rotary, -rotary) * 2, 1)), 3), values


def heads_exchanged(self: LatentAttention, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Some heads' keys are those that another's rows in the weight make."""
    nope, values = _by_head(self, latent)
    return torch.cat((nope.flip(1), _for_all(rotary)), 3), values


def changed_after(self: LatentAttention, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Values are changed in place once they are made."""
    keys, values = joined(self, latent, rotary)
    values.mul_(0.5)
    return keys, values


def normalised(self: LatentAttention, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Keys are more than linear in the latent."""
    nope, values = _by_head(self, latent)
    return torch.cat((F.normalize(nope, dim=-1), _for_all(rotary)), 3), values


ABSORBED: dict[str, Expand] = {
    each.__name__: each for each in (joined, filled, rotary_first, values_first, two_maps, without_rotary)
}
LEFT: dict[str, Expand] = {
    each.__name__: each for each in (with_bias, rotary_by_head, heads_exchanged, changed_after, normalised)
}
TOO_WIDE = 60
"""A rank with which a latent and its rotary key are more than all keys and values."""


class LatentAttention(nn.Module):
    def __init__(self, expand: Expand, rank: int = RANK) -> None:
        super().__init__()
        self.rank = rank
        self.q = nn.Linear(WIDTH, HEADS * (NOPE + ROPE), bias=False)
        self.latent = nn.Linear(WIDTH, rank + ROPE, bias=False)
        self.norm = nn.LayerNorm(rank)
        self.kv = nn.Linear(rank, HEADS * (NOPE + VALUE), bias=False)
        self.k = nn.Linear(rank, HEADS * NOPE, bias=False)
        self.v = nn.Linear(rank, HEADS * VALUE, bias=False)
        self.wide = nn.Linear(rank, HEADS * (NOPE + ROPE + VALUE), bias=False)
        self.biased = nn.Linear(rank, HEADS * (NOPE + VALUE))
        self.out = nn.Linear(HEADS * VALUE, WIDTH, bias=False)
        self.expand = expand

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        latent, rotary = self.latent(hidden).split((self.rank, ROPE), 2)
        angle = position_ids[..., None] * torch.tensor([1.0, 0.3])
        turn = torch.polar(torch.ones_like(angle), angle)
        rotary = torch.view_as_real(torch.view_as_complex(rotary.unflatten(2, (2, 2))) * turn).flatten(2)
        keys, values = self.expand(self, self.norm(latent), rotary)
        q = self.q(hidden).unflatten(2, (HEADS, NOPE + ROPE)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


class LatentDecoder(nn.Module):
    """`(input_ids, position_ids)` -> logits, with a layer of each kind; the last one has a latent that is too wide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layers = [LatentAttention(expand) for expand in (*ABSORBED.values(), *LEFT.values())]
        self.layers = nn.ModuleList([*layers, LatentAttention(joined, TOO_WIDE)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden, position_ids)
        logits: Tensor = self.head(hidden)
        return logits


def deepseek(layers: int = 2) -> Any:
    """Layers without experts; the full keys and values of a token have 4 x (16 + 8) elements, its latent 16 + 8."""
    config = DeepseekV3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=layers, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    return build(DeepseekV3ForCausalLM, config)
