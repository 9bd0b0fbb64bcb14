"""Scorers: how much each cached token matters. One small class a file, with the paper it comes from.

snapkv              attention of the newest queries, pooled     SnapKV, arXiv 2404.14469
h2o                 attention of every query, summed            H2O, arXiv 2306.14048
tova                attention of the last query, over all heads  TOVA, arXiv 2401.06104
expected_attention  attention that coming queries will pay      Expected Attention, arXiv 2510.00636
key_norm            small keys first                            arXiv 2406.11430
key_diff            keys unlike the others first                KeyDiff, arXiv 2504.15364
streaming           the first tokens, then the newest           StreamingLLM, arXiv 2309.17453
value_norm          another score times the value's norm        VATP, arXiv 2406.12335
reconstruction      attention when the text is read again       KVzip, arXiv 2505.23416
random              chance, as a baseline
"""

from xkv_fx.runtime.scorers.accumulated import H2O
from xkv_fx.runtime.scorers.base import (
    Scorer,
    check_independent_heads,
    check_measures_attention,
    check_scores_parts,
    future_positions,
    make_scorer,
    reading_of,
    register_scorer,
    rescore_coded_tokens,
    rescore_tokens,
    score_tokens,
    scorer_names,
    scorer_of,
    scoring_call,
)
from xkv_fx.runtime.scorers.expected_attention import ExpectedAttention
from xkv_fx.runtime.scorers.key_diff import KeyDiff
from xkv_fx.runtime.scorers.key_norm import KeyNorm
from xkv_fx.runtime.scorers.prompt import PromptView
from xkv_fx.runtime.scorers.random import Random
from xkv_fx.runtime.scorers.reconstruction import Reconstruction
from xkv_fx.runtime.scorers.snapkv import SnapKV
from xkv_fx.runtime.scorers.streaming import Streaming
from xkv_fx.runtime.scorers.tova import TOVA
from xkv_fx.runtime.scorers.value_norm import ValueNorm

__all__ = [
    "H2O",
    "TOVA",
    "ExpectedAttention",
    "KeyDiff",
    "KeyNorm",
    "PromptView",
    "Random",
    "Reconstruction",
    "Scorer",
    "SnapKV",
    "Streaming",
    "ValueNorm",
    "check_independent_heads",
    "check_measures_attention",
    "check_scores_parts",
    "future_positions",
    "make_scorer",
    "reading_of",
    "register_scorer",
    "rescore_coded_tokens",
    "rescore_tokens",
    "score_tokens",
    "scorer_names",
    "scorer_of",
    "scoring_call",
]
