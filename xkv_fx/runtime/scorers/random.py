"""Chance as a score: what any other scorer should beat."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int
from xkv_fx.runtime.scorers.base import register_scorer
from xkv_fx.runtime.scorers.prompt import PromptView

_MASK = 0xFFFFFFFF


@register_scorer("random")
@dataclasses.dataclass(frozen=True)
class Random:
    """A number in [0, 1) that depends on the seed, the KV head and the token's ordinal alone.

    So a row's scores do not depend on its batch, and a token keeps its score when the prompt is extended. All layers
    draw alike. The baseline of comparisons such as kvpress (https://github.com/NVIDIA/kvpress).

    Attributes:
        seed: from 0 to 2**32 - 1.
    """

    seed: int = 0
    paper: ClassVar[str] = "a baseline, as in https://github.com/NVIDIA/kvpress"
    looks_at_question: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    measures_attention: ClassVar[bool] = False
    knows_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not is_int(self.seed) or not 0 <= self.seed <= _MASK:
            raise BudgetError(f"seed must be a whole number from 0 to {_MASK}; got {self.seed!r}")

    def __call__(self, prompt: PromptView) -> Tensor:
        places = range(prompt.ordinals.shape[1]) if prompt.heads is None else prompt.heads
        heads = torch.tensor(tuple(places), device=prompt.ordinals.device)[:, None]
        of_head = _mix(_mix(torch.full_like(heads, self.seed)) ^ heads)
        drawn = _mix(of_head ^ prompt.ordinals)
        return (drawn >> 8).float() / 2**24  # the 24 bits that float32 holds


def _mix(number: Tensor) -> Tensor:
    """A bijection of the whole numbers below 2**32, held in int64, that sends neighbours far apart.

    Add, then twice fold the high bits down and multiply by an odd number, which is small enough for int64.
    """
    number = (number + 0x9E3779B9) & _MASK
    number = ((number ^ (number >> 16)) * 0x2C1B3C6D) & _MASK
    number = ((number ^ (number >> 15)) * 0x297A2D39) & _MASK
    return number ^ (number >> 16)
