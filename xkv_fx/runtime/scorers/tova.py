"""TOVA's score: what the last token attends to, with one voice for the whole layer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from xkv_fx.runtime.scorers.base import register_scorer
from xkv_fx.runtime.scorers.prompt import PromptView


@register_scorer("tova")
@dataclasses.dataclass(frozen=True)
class TOVA:
    """Attention of the last query, averaged over all query heads of the layer; a token scores the same in each KV head.

    TOVA (arXiv 2401.06104). Where KV heads hold different tokens, as eviction by accumulated scores can cause,
    a head that dropped a token counts as paying it nothing.
    """

    paper: ClassVar[str] = "TOVA, arXiv 2401.06104"
    looks_at_question: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False
    measures_attention: ClassVar[bool] = True

    def __call__(self, prompt: PromptView) -> Tensor:
        paid = prompt.attention_of_last(1)[:, :, :, 0].mean(2)
        if prompt.old_ordinals is None:
            return paid.mean(1, keepdim=True).expand_as(paid)
        return _mean_over_heads(paid, prompt.ordinals)


def _mean_over_heads(values: Tensor, ordinals: Tensor) -> Tensor:
    """For each candidate, the sum of `values` over the heads that hold the same token, divided by the number of heads.

    Args:
        values, ordinals: `[rows, kv_heads, N]`; one slot may hold different tokens in different heads.
    """
    flat = ordinals.flatten(1)
    token = torch.searchsorted(flat.sort(1).values, flat)  # equal for equal ordinals, and less than kv_heads * N
    values_of_token = torch.zeros_like(values.flatten(1)).scatter_add_(1, token, values.flatten(1))
    return values_of_token.gather(1, token).view_as(values) / values.shape[1]
