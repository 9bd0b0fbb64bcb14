"""Variable tracking: a chain of assignments, spread over a long text (RULER, arXiv 2404.06654, section 3.2)."""

from __future__ import annotations

import itertools
import string

import numpy as np

from xkv_fx.evaluation.tasks.base import Drawn, Encoder, Instance, bury, register_task
from xkv_fx.evaluation.tasks.words import numbers

HOPS = 4
DIGITS = 5
LETTERS = 3
_OPENING = "Follow the chain of variable assignments that is hidden in the following text.\n\n"


@register_task("variable_tracking")
def variable_tracking(encoder: Encoder, rng: np.random.Generator, length: int) -> Instance:
    """A number is given to one variable, and on from there to four more; all five are asked for."""
    names = _names(rng, HOPS + 1)
    (value,) = numbers(rng, 1, DIGITS)
    needles = (
        f"VAR {names[0]} = {value}.",
        *(f"VAR {after} = VAR {before}." for before, after in itertools.pairwise(names)),
    )
    question = (
        f"\n\nQuestion: Which {HOPS + 1} variables are assigned the value {value}, directly or through others?\n"
        f"Answer: The {HOPS + 1} variables that are assigned the value {value} are VAR"
    )
    return bury(encoder, rng, length, _OPENING, Drawn(needles, question, tuple(names), (value,)))


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of capital letters that are no words: none has a vowel."""
    letters = [letter for letter in string.ascii_uppercase if letter not in "AEIOUY"]
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(letters[place] for place in rng.integers(len(letters), size=LETTERS).tolist())] = None
    return list(found)
