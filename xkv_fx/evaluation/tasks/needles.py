"""Needles: numbers hidden in a long text, one of them, one among several, or all of one key (RULER, arXiv 2404.06654,
section 3.1)."""

from __future__ import annotations

import numpy as np

from xkv_fx.evaluation.tasks.base import Drawn, Encoder, Instance, bury, register_task
from xkv_fx.evaluation.tasks.words import ADJECTIVES, NOUNS, draw, numbers

KEYS = 4
VALUES = 4
DIGITS = 5
_OPENING = "Some secret numbers are hidden in the following text. Remember them; you will be asked for them.\n\n"


@register_task("needle_single")
def needle_single(encoder: Encoder, rng: np.random.Generator, length: int) -> Instance:
    """One number, which is asked for."""
    return _one_of(encoder, rng, length, 1)


@register_task("needle_multi_key")
def needle_multi_key(encoder: Encoder, rng: np.random.Generator, length: int) -> Instance:
    """Four numbers with four keys, of which one is asked for."""
    return _one_of(encoder, rng, length, KEYS)


@register_task("needle_multi_value")
def needle_multi_value(encoder: Encoder, rng: np.random.Generator, length: int) -> Instance:
    """Four numbers with one key, all of which are asked for."""
    (key,) = _keys(rng, 1)
    values = numbers(rng, VALUES, DIGITS)
    question = (
        f"\n\nQuestion: What are all the secret numbers for {key} in the text?\n"
        f"Answer: The secret numbers for {key} are"
    )
    needles = tuple(_needle(key, value) for value in values)
    return bury(encoder, rng, length, _OPENING, Drawn(needles, question, tuple(values), (key,)))


def _one_of(encoder: Encoder, rng: np.random.Generator, length: int, count: int) -> Instance:
    keys, values = _keys(rng, count), numbers(rng, count, DIGITS)
    asked = int(rng.integers(count))
    needles = tuple(_needle(key, value) for key, value in zip(keys, values, strict=True))
    question = (
        f"\n\nQuestion: What is the secret number for {keys[asked]} in the text?\n"
        f"Answer: The secret number for {keys[asked]} is"
    )
    return bury(encoder, rng, length, _OPENING, Drawn(needles, question, (values[asked],), tuple(keys)))


def _keys(rng: np.random.Generator, count: int) -> list[str]:
    """Keys that share no word."""
    return [
        f"{adjective}-{noun}"
        for adjective, noun in zip(draw(rng, ADJECTIVES, count), draw(rng, NOUNS, count), strict=True)
    ]


def _needle(key: str, value: str) -> str:
    return f"One of the secret numbers for {key} is: {value}."
