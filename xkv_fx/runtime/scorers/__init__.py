"""Scorers: how much each cached token matters. One small class a file, with the paper it comes from."""

from xkv_fx.runtime.scorers.base import (
    Scorer,
    make_scorer,
    register_scorer,
    rescore_tokens,
    score_tokens,
    scorer_names,
    scorer_of,
)
from xkv_fx.runtime.scorers.prompt import PromptView
from xkv_fx.runtime.scorers.snapkv import SnapKV

__all__ = [
    "PromptView",
    "Scorer",
    "SnapKV",
    "make_scorer",
    "register_scorer",
    "rescore_tokens",
    "score_tokens",
    "scorer_names",
    "scorer_of",
]
