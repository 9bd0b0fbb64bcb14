"""Choosing a token for each row from logits, on the device they are on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xkv_fx.errors import PromptError
from xkv_fx.files import is_int

Choose = Callable[[Tensor], Tensor]
"""Tokens int64 `[rows]` from logits `[rows, vocabulary]`."""


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each row, int64 `[rows]`, from logits `[rows, vocabulary]`."""
    return logits.argmax(-1)


def token_chooser(
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    top_p: float | None = None,
) -> Choose:
    """The likeliest token, or with `do_sample` one drawn from the distribution.

    Args:
        temperature, top_k: of that distribution.
        generator: source of the random numbers.
        top_p: draw from the likeliest tokens that together have this probability (nucleus sampling, arXiv 1904.09751),
            after `top_k`.

    Raises:
        PromptError: an argument out of its range.
    """
    if do_sample and not (isinstance(temperature, int | float) and temperature > 0):
        raise PromptError(f"temperature must be above 0; got {temperature!r}")
    if top_k is not None and (not is_int(top_k) or top_k < 1):
        raise PromptError(f"top_k must be a whole number of at least 1, or None; got {top_k!r}")
    if top_p is not None and not (isinstance(top_p, int | float) and 0 < top_p <= 1):
        raise PromptError(f"top_p must be above 0 and at most 1, or None; got {top_p!r}")
    if not do_sample:
        return likeliest

    def draw(logits: Tensor) -> Tensor:
        logits = logits.float() / temperature
        if top_k is not None:
            least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if top_p is not None and top_p < 1:
            logits = _nucleus(logits, top_p)
        return torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]

    return draw


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits `[rows, vocabulary]`, minus infinity for all tokens but the likeliest that come to `top_p`; the one that
    passes it is among them."""
    ordered, order = logits.sort(-1, descending=True)
    before = torch.softmax(ordered, -1).cumsum(-1).roll(1, -1)
    before[:, 0] = 0
    return torch.full_like(logits, float("-inf")).scatter(
        -1, order, ordered.masked_fill(before >= top_p, float("-inf"))
    )
