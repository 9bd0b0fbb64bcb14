"""KeyDiff's score: how unlike the other keys a key is, which needs no attention at all."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from xkv_fx.runtime.scorers.base import register_scorer
from xkv_fx.runtime.scorers.prompt import PromptView


@register_scorer("key_diff")
@dataclasses.dataclass(frozen=True)
class KeyDiff:
    """Minus the cosine similarity of the key to the mean of the normalised keys of its KV head.

    KeyDiff (arXiv 2504.15364). The mean is over the candidates that are there: kept and new ones, and in a layer with
    a sliding window also those that have left the window. Scores lie in -1 .. 1.
    """

    paper: ClassVar[str] = "KeyDiff, arXiv 2504.15364"
    looks_at_question: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    measures_attention: ClassVar[bool] = False
    independent_heads: ClassVar[bool] = True

    def __call__(self, prompt: PromptView) -> Tensor:
        keys = torch.nn.functional.normalize(prompt.keys.float(), dim=-1).masked_fill(~prompt.there[..., None], 0.0)
        mean_direction = torch.nn.functional.normalize(keys.sum(2), dim=-1)  # the sum points where the mean does
        return -torch.matmul(keys, mean_direction[..., None])[..., 0]
