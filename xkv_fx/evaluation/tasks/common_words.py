"""Common words: a long list, in which some words come much more often than others (RULER, arXiv 2404.06654,
section 3.3)."""

from __future__ import annotations

import itertools

import numpy as np

from xkv_fx.errors import PromptError
from xkv_fx.evaluation.tasks.base import Encoder, Instance, instance, register_task
from xkv_fx.evaluation.tasks.words import NOUNS, draw

COMMON = 5
LEAST_TIMES = 3
_OPENING = "Below is a list of words. Some of them appear many times, the others only a few times.\n\n"
_QUESTION = (
    f"\n\nQuestion: What are the {COMMON} most common words in the list above?\n"
    f"Answer: The {COMMON} words that appear most often in the list are"
)


@register_task("common_words")
def common_words(encoder: Encoder, rng: np.random.Generator, length: int) -> Instance:
    """Five words make up half of the list, and all of them are asked for. The other half is spread over all other
    words; its last word is cut off where the list is full."""
    words = draw(rng, NOUNS, len(NOUNS))
    common, others = words[:COMMON], itertools.cycle(words[COMMON:])
    start, question = (*encoder.start, *encoder(_OPENING)), encoder(_QUESTION)
    room = length - len(start) - len(question)

    one_of_each = sum(len(_entry(encoder, word)) for word in common)
    rare: list[str] = []
    times = 0
    while True:
        more = [next(others) for _ in common]
        cost = one_of_each + sum(len(_entry(encoder, word)) for word in more)
        if cost > room:
            break
        rare += more
        times += 1
        room -= cost
    if times < LEAST_TIMES:
        raise PromptError(f"{length} tokens are too few for each of {COMMON} words to come {LEAST_TIMES} times")
    listed = common * times + rare
    body = [token for place in rng.permutation(len(listed)).tolist() for token in _entry(encoder, listed[place])]
    for word in itertools.chain(more, others):
        if not room:
            break
        part = _entry(encoder, word)[:room]
        body += part
        room -= len(part)
    return instance(encoder, (*start, *body), question, tuple(common))


def _entry(encoder: Encoder, word: str) -> tuple[int, ...]:
    return encoder(f" {word},")
