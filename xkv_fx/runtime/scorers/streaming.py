"""StreamingLLM's choice as a score: the first tokens, then the newest."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int
from xkv_fx.runtime.scorers.base import register_scorer
from xkv_fx.runtime.scorers.prompt import PromptView


@register_scorer("streaming")
@dataclasses.dataclass(frozen=True)
class Streaming:
    """Later tokens score higher; the first `sinks` tokens score above all others, the very first highest.

    StreamingLLM (arXiv 2309.17453). Kept tokens stay at their own positions, whereas StreamingLLM counts positions
    anew within its cache. Scores are whole numbers: float32 tells tokens apart up to an ordinal of 2**24.

    Attributes:
        sinks: how many of the first tokens are attention sinks. `Policy(sinks=...)` keeps them whatever the capacity;
            these come after the policy's sinks and recent tokens.
    """

    sinks: int = 4
    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    looks_at_question: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    measures_attention: ClassVar[bool] = False
    independent_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not is_int(self.sinks) or self.sinks < 0:
            raise BudgetError(f"sinks must be a whole number of at least 0; got {self.sinks!r}")

    def __call__(self, prompt: PromptView) -> Tensor:
        ordinals = prompt.ordinals
        above_all = (prompt.seen + prompt.length)[:, None, None] + self.sinks - ordinals
        return torch.where(ordinals < self.sinks, above_all, ordinals).float()
