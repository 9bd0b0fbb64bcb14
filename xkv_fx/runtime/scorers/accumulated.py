"""H2O's score: the attention that a token has been paid by every query of the prompt."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from xkv_fx.runtime.attention import BLOCK
from xkv_fx.runtime.coded import Stored, held_keys
from xkv_fx.runtime.form import AttentionForm
from xkv_fx.runtime.scorers.base import register_scorer
from xkv_fx.runtime.scorers.prompt import PromptView


@register_scorer("h2o")
@dataclasses.dataclass(frozen=True)
class H2O:
    """Causal attention summed over all queries of the prompt. The score of a KV head is the mean over its query heads.

    H2O (arXiv 2306.14048): the accumulated attention score that finds the heavy hitters. Each query counts alike, those
    of a question at the end no more than others.

    In an extend only the new queries are summed: what earlier queries paid to the tokens in the slots is not added.
    """

    paper: ClassVar[str] = "H2O, arXiv 2306.14048"
    looks_at_question: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    measures_attention: ClassVar[bool] = True
    independent_heads: ClassVar[bool] = True

    def __call__(self, prompt: PromptView) -> Tensor:
        held = prompt.old_k
        mass: Tensor = accumulated_attention(
            prompt.q,
            prompt.k,
            prompt.length,
            prompt.scale,
            prompt.seen,
            held.cache if isinstance(held, Stored) else held,
            prompt.old_ordinals,
            prompt.sliding_window,
            prompt.softcap,
            prompt.sink_logits,
            prompt.slopes,
            *((held.scales, held.mean, held.bits) if isinstance(held, Stored) else ()),
        )
        return mass


# An op, since the loop needs the number of queries, which is a symbol while a graph is built.
@torch.library.custom_op("xkv::accumulated_attention", mutates_args=())
def accumulated_attention(
    q: Tensor,
    k: Tensor,
    length: Tensor,
    scale: float,
    seen: Tensor,
    old_k: Tensor | None = None,
    old_ordinals: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
    old_scales: Tensor | None = None,
    old_mean: Tensor | None = None,
    old_bits: int = 0,
) -> Tensor:
    """Attention that each candidate is paid by all valid new queries; the arguments are those of `PromptView`, the form
    flattened, and `old_k` as a cache, scales, mean and bits where it is stored in fewer of them.

    The queries are taken `BLOCK` at a time, so that no more than `[rows, query_heads, BLOCK, N]` weights exist at once.

    Returns:
        float32 `[rows, kv_heads, N]`, summed over queries, mean over the query group.
    """
    form = AttentionForm(scale, sliding_window, softcap, sink_logits, slopes)
    held = held_keys(old_k, old_scales, old_bits, k.shape[3], old_mean)
    prompt = PromptView(q, k, None, length, form, seen, held, None, old_ordinals)
    mass = torch.zeros(prompt.ordinals.shape, dtype=torch.float32, device=q.device)
    for start in range(0, q.shape[2], BLOCK):
        paid = prompt.attention_of_block(start, min(start + BLOCK, q.shape[2]))
        mass[:, :, : paid.shape[-1]] += paid.sum(3).mean(2)
    return mass


@accumulated_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    length: Tensor,
    scale: float,
    seen: Tensor,
    old_k: Tensor | None = None,
    old_ordinals: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
    old_scales: Tensor | None = None,
    old_mean: Tensor | None = None,
    old_bits: int = 0,
) -> Tensor:
    slots = 0 if old_k is None else old_k.shape[2]
    return k.new_empty((k.shape[0], k.shape[1], slots + k.shape[2]), dtype=torch.float32)
