"""How much a token is needed when the text is read again."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import ClassVar

import torch
from torch import Tensor

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int
from xkv_fx.runtime.reading import Reading
from xkv_fx.runtime.scorers.base import register_scorer
from xkv_fx.runtime.scorers.prompt import PromptView

_BLOCK = 128
"""Queries of the second reading that are asked at once."""


@register_scorer("reconstruction")
@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The largest attention that a token gets while the text is read a second time, from any query of its KV head's
    group (KVzip, arXiv 2505.23416, section 3).

    The new tokens are fed twice, with an instruction in between; survivors are chosen among the first reading. A
    question that comes in a later turn finds what it needs, since nothing here looks at one. The price is a second
    prefill: about twice the time, and positions up to the end of the second reading.

    A slot keeps its score: at a later turn it is the larger one of what it has and what the second reading of the new
    tokens pays to it. Generated tokens have only the latter. Sliding windows are left out of account while scoring,
    since a second reading is far from the first.

    Attributes:
        chunk: a longer prompt is fed in pieces of so many tokens, each read again before the next one comes, so that
            memory grows with a piece and not with the prompt.
        instruction: token ids between the two readings, as a string with spaces, such as those of "Repeat the previous
            text:"; none by default.
    """

    chunk: int = 2048
    instruction: str = ""
    paper: ClassVar[str] = "KVzip, arXiv 2505.23416"
    looks_at_question: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    measures_attention: ClassVar[bool] = True
    independent_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not is_int(self.chunk) or self.chunk < 1:
            raise BudgetError(f"chunk must be a whole number of at least 1; got {self.chunk!r}")
        if not isinstance(self.instruction, str) or not re.fullmatch(r"(\d{1,9}( |$))*", self.instruction):
            raise BudgetError(f"instruction must be token ids with spaces between them; got {self.instruction!r:.100}")

    @functools.cached_property
    def reading(self) -> Reading:
        """How prompts are fed to this scorer."""
        return Reading(tuple(map(int, self.instruction.split())), self.chunk)

    def __call__(self, prompt: PromptView) -> Tensor:
        both, gap = prompt.k.shape[2], self.reading.gap
        columns = (both - gap) // 2
        largest = prompt.k.new_zeros(prompt.ordinals.shape, dtype=torch.float32)
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            place = torch.arange(start, stop, device=prompt.k.device)
            asked = prompt.length[:, None] + gap + place  # a row of fewer tokens is read again sooner
            exists = place < prompt.length[:, None]
            paid = prompt.largest_attention_from(asked, exists, min(columns + gap + stop, both))
            largest = torch.maximum(largest, paid)
        return prompt.with_kept_scores(largest)
