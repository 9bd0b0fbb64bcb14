"""Sampling from the likeliest tokens, against a loop over the sorted probabilities and transformers' own processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from xkv_fx.errors import PromptError
from xkv_fx.runtime.choose_tokens import token_chooser

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, 3.0, 0.4], [0.1, 0.0, 0.2, 0.3, -0.1, 0.05]])


def nucleus(logits: list[float], top_p: float) -> set[int]:
    probabilities = torch.softmax(torch.tensor(logits), 0).tolist()
    kept: set[int] = set()
    for token in sorted(range(len(logits)), key=lambda token: -probabilities[token]):
        if sum(probabilities[other] for other in kept) >= top_p:
            break
        kept.add(token)
    return kept


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.62, 0.9, 0.999, 1])
def test_only_the_likeliest_that_come_to_top_p_are_drawn(top_p: float) -> None:
    choose = token_chooser(True, generator=torch.Generator().manual_seed(0), top_p=top_p)
    drawn = torch.stack([choose(LOGITS) for _ in range(800)], 1)
    for row, logits in enumerate(LOGITS.tolist()):
        assert set(drawn[row].tolist()) == nucleus(logits, top_p)


def test_top_p_is_of_what_temperature_and_top_k_leave() -> None:
    choose = token_chooser(True, 0.5, 3, torch.Generator().manual_seed(0), 0.95)
    likeliest = [logits if index in (4, 0, 1) else -1e9 for index, logits in enumerate((LOGITS[0] / 0.5).tolist())]
    drawn = {int(choose(LOGITS[:1])[0]) for _ in range(500)}
    assert drawn == nucleus(likeliest, 0.95)


@pytest.mark.parametrize("top_k", [None, 1, 5])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_what_may_be_drawn_is_what_transformers_leaves(temperature: float, top_k: Any, top_p: Any) -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    left = torch.softmax(warpers(torch.zeros(3, 1, dtype=torch.long), logits), -1)
    expected = torch.multinomial(left, 1, generator=torch.Generator().manual_seed(7))[:, 0]
    choose = token_chooser(True, temperature, top_k, torch.Generator().manual_seed(7), top_p)
    assert torch.equal(choose(logits), expected)


@pytest.mark.parametrize("top_p", [0, -0.5, 1.5, float("nan")])
def test_what_is_no_probability_is_refused(top_p: float) -> None:
    with pytest.raises(PromptError, match="top_p must be above 0 and at most 1"):
        token_chooser(True, top_p=top_p)
