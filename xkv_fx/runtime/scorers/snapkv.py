"""SnapKV's score, which XKV profiles and serves with."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int
from xkv_fx.runtime.scorers.base import register_scorer
from xkv_fx.runtime.scorers.prompt import PromptView


@register_scorer("snapkv")
@dataclasses.dataclass(frozen=True)
class SnapKV:
    """Attention that the newest queries pay to each token, summed over them, average-pooled along the sequence.

    SnapKV (arXiv 2404.14469, section 4); the defaults are XKV's (arXiv 2412.05896). The score of a KV head is the mean
    over its query heads. Tokens inside the observation window are pooled apart from the tokens before it.

    Attributes:
        observation_window: number of newest queries that are asked.
        kernel: odd width of the average pooling; 1 for none.
    """

    observation_window: int = 8
    kernel: int = 7
    paper: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    looks_at_question: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False
    measures_attention: ClassVar[bool] = True
    independent_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not is_int(self.observation_window) or self.observation_window < 1:
            raise BudgetError(
                f"observation_window must be a whole number of at least 1; got {self.observation_window!r}"
            )
        if not is_int(self.kernel) or self.kernel < 1 or self.kernel % 2 == 0:
            raise BudgetError(f"kernel must be an odd whole number of at least 1; got {self.kernel!r}")

    def __call__(self, prompt: PromptView) -> Tensor:
        mass = prompt.attention_of_last(self.observation_window).sum(3).mean(2)
        first_observed = (prompt.seen + prompt.length - self.observation_window)[:, None, None]
        observed = prompt.in_order(prompt.ordinals) >= first_observed
        mass = prompt.in_order(mass)
        pooled = torch.where(
            observed, self._pool(mass.masked_fill(~observed, 0.0)), self._pool(mass.masked_fill(observed, 0.0))
        )
        return prompt.back(pooled)

    def _pool(self, mass: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool1d(mass, self.kernel, stride=1, padding=self.kernel // 2)
