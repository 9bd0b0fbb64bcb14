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
        # The sum of the directions points where their mean does; a sum needs no more than one column of each piece.
        sums = prompt.of_keys(lambda keys, there: _directions(keys, there).sum(2)[..., None])
        mean_direction = torch.nn.functional.normalize(sums.sum(-1), dim=-1)[..., None]
        return -prompt.of_keys(lambda keys, there: torch.matmul(_directions(keys, there), mean_direction)[..., 0])


def _directions(keys: Tensor, there: Tensor) -> Tensor:
    """Keys of length 1, and of length 0 where no candidate is there."""
    return torch.nn.functional.normalize(keys, dim=-1).masked_fill(~there[..., None], 0.0)
