"""H2O's score: the attention that a token has been paid by every query of the prompt."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from xkv_fx.runtime.attention import BLOCK
from xkv_fx.runtime.scorers.base import register_scorer
from xkv_fx.runtime.scorers.prompt import PromptView


@register_scorer("h2o")
@dataclasses.dataclass(frozen=True)
class H2O:
    """Causal attention summed over all queries of the prompt. The score of a KV head is the mean over its query heads.

    H2O (arXiv 2306.14048): the accumulated attention score that finds the heavy hitters. Each query counts alike, those
    of a question at the end no more than others.

    In an extend only the new queries are summed: what earlier queries paid to the tokens in the slots is not added.

    The queries are taken `BLOCK` at a time, so that no more than `[rows, query_heads, BLOCK, N]` weights exist at once.
    """

    paper: ClassVar[str] = "H2O, arXiv 2306.14048"
    looks_at_question: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False

    def __call__(self, prompt: PromptView) -> Tensor:
        mass = torch.zeros(prompt.ordinals.shape, dtype=torch.float32, device=prompt.q.device)
        new = prompt.q.shape[2]
        for start in range(0, new, BLOCK):
            paid = prompt.attention_of_block(start, min(start + BLOCK, new))
            mass[:, :, : paid.shape[-1]] += paid.sum(3).mean(2)
        return mass
