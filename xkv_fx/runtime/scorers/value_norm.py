"""VATP's score: another scorer's, weighted by how large the value is that the token adds to the output."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int
from xkv_fx.runtime.scorers.base import make_scorer, reading_of, register_scorer
from xkv_fx.runtime.scorers.prompt import PromptView

_NEVER_NEGATIVE = frozenset({"h2o", "random", "snapkv", "streaming", "tova"})


@register_scorer("value_norm")
@dataclasses.dataclass(frozen=True)
class ValueNorm:
    """The score of `base`, with that scorer's default options, times the norm of the token's value.

    VATP (arXiv 2406.12335): attention times the L1 norm of the value. The paper
    handles attention sinks, whose values are small, apart from the score; here that is `Policy(sinks=...)`.

    Attributes:
        base: name of another scorer, whose scores are never negative: a larger value must not make a token worth less.
            A scorer of your own says so by a class attribute `never_negative = True`.
        norm: 1 for the L1 norm, the paper's; 2 for the L2 norm.
        looks_at_question, independent_heads: as `base`.

    Raises:
        BudgetError: another norm, or a base that is unknown, may be negative, or is this scorer itself.
    """

    base: str = "snapkv"
    norm: int = 1
    paper: ClassVar[str] = "VATP, arXiv 2406.12335"
    looks_at_question: ClassVar[bool] = True
    reads_values: ClassVar[bool] = True
    measures_attention: ClassVar[bool] = False
    independent_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not is_int(self.norm) or self.norm not in (1, 2):
            raise BudgetError(f"norm must be 1 or 2; got {self.norm!r}")
        if not isinstance(self.base, str):
            raise BudgetError(f"base must be the name of a registered scorer; got {self.base!r}")
        if self.base == "value_norm":
            raise BudgetError("value_norm cannot be its own base; name another scorer, such as 'snapkv'")
        scorer = make_scorer(self.base, {})
        if getattr(scorer, "needs_unrotated_queries", False):
            raise BudgetError(
                f"the scores of {self.base!r} cannot be weighted: they are made from unrotated queries, which are not "
                "handed on; expected_attention weights by values itself"
            )
        if reading_of(scorer) is not None:
            raise BudgetError(
                f"the scores of {self.base!r} cannot be weighted: a slot keeps the score that it was chosen by, and "
                "would be weighted again in every turn"
            )
        if self.base not in _NEVER_NEGATIVE and not getattr(scorer, "never_negative", False):
            raise BudgetError(
                f"the scores of {self.base!r} may be negative, and then a larger value would make a token worth less; "
                f"choose one of {', '.join(sorted(_NEVER_NEGATIVE))}, or a scorer with never_negative = True"
            )
        object.__setattr__(self, "looks_at_question", scorer.looks_at_question)
        object.__setattr__(self, "independent_heads", getattr(scorer, "independent_heads", False))

    def __call__(self, prompt: PromptView) -> Tensor:
        norm = prompt.of_values(lambda values, there: torch.linalg.vector_norm(values, self.norm, dim=-1))
        return make_scorer(self.base, {})(prompt) * norm.masked_fill(~prompt.there, 0.0)
