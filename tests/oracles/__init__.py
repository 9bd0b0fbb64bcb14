"""A plain and slow statement of every op, by loops and in float64: the oracle that each faster form is tested against.

It shares no code with what it checks. Shapes, dtypes and arguments are those of `xkv_fx.runtime.ops`.
"""

from oracles.attention_loops import (
    attend,
    attention,
    decode_attention,
    decode_scored,
    extend_attention,
    picked,
)
from oracles.scores import snapkv_scores_reference
from oracles.selection import keep
from oracles.slots import reference_ordinals, reference_slot

__all__ = [
    "attend",
    "attention",
    "decode_attention",
    "decode_scored",
    "extend_attention",
    "keep",
    "picked",
    "reference_ordinals",
    "reference_slot",
    "snapkv_scores_reference",
]
