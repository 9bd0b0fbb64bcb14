"""Decoding in a loop: no token leaves the device, and nothing stands between two steps but their choice."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from xkv_fx.errors import PromptError
from xkv_fx.files import is_int
from xkv_fx.runtime.choose_tokens import Choose, likeliest
from xkv_fx.runtime.session import Session, refuse_rows_of_padding, refuse_unknown_tokens


def generate_tokens(
    session: Session,
    ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    choose: Choose = likeliest,
    end_tokens: Collection[int] = (),
    pad_token: int = 0,
) -> Tensor:
    """Feed a prompt or a turn, `ids` int64 `[rows, S]`, and decode behind it as `decode_steps` does.

    Args:
        attention_mask: `[rows, S]`, 0 for padding before or after a row's tokens.

    Returns:
        int64 `[rows, S + new]`; new ends when every row is over, after `max_new_tokens` at most.

    Raises:
        PromptError: `max_new_tokens` below 1, invalid end or padding tokens, a row of padding only, or as
            `Session.feed`.
        CapacityError: as `Session.feed`, and at once if `max_new_tokens` are more than there is room for.
    """
    _check("max_new_tokens", max_new_tokens, end_tokens, pad_token)
    refuse_rows_of_padding(attention_mask)
    valid = None if attention_mask is None else attention_mask != 0
    session.check_room(max_new_tokens, ids, valid)
    logits = session.feed(ids, valid=valid)
    return torch.cat((ids, _decode(logits, session.step, max_new_tokens, choose, end_tokens, pad_token)), 1)


def decode_steps(
    session: Session,
    ids: Tensor,
    n: int,
    choose: Choose,
    end_tokens: Collection[int] = (),
    pad_token: int = 0,
) -> Tensor:
    """Feed `ids`, choose a token for each row, feed that, and so on, `n` times.

    Args:
        session: one that has been fed a prompt.
        ids: int64 `[rows, 1]`.
        end_tokens: a row is over once it has one of these, and is filled up with `pad_token`; whether all rows are over
            is checked after every step, and on a GPU each check waits for the step.

    Returns:
        the tokens that were chosen, int64 `[rows, n]`, fewer columns if every row is over. The last has not been fed.

    Raises:
        PromptError: `n` below 1, invalid end or padding tokens, or as `Session.step`.
        CapacityError: as `Session.step`, but at once if there is no room for all `n`.
    """
    _check("n", n, end_tokens, pad_token)
    session.check_steps(n)
    refuse_unknown_tokens(ids, session.program.known_tokens)
    return _decode(session.step(ids), session.step, n, choose, end_tokens, pad_token)


def _decode(
    logits: Tensor,
    step: Callable[[Tensor], Tensor],
    n: int,
    choose: Choose,
    end_tokens: Collection[int],
    pad_token: int,
) -> Tensor:
    """`decode_steps` from the logits of what was fed first."""
    ends = torch.tensor(sorted(end_tokens), dtype=torch.int64, device=logits.device)
    over = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    tokens: list[Tensor] = []
    for _ in range(n):
        if tokens:
            logits = step(tokens[-1])
        chosen = choose(logits[:, -1])
        if len(ends):
            chosen = chosen.masked_fill(over, pad_token)
            over = over | torch.isin(chosen, ends)
        tokens.append(chosen[:, None])
        if len(ends) and bool(over.all()):
            break
    return torch.cat(tokens, 1)


def _check(name: str, count: int, end_tokens: Collection[int], pad_token: int) -> None:
    if not is_int(count) or count < 1:
        raise PromptError(f"{name} must be a whole number of at least 1; got {count!r}")
    if not isinstance(end_tokens, Collection) or not all(is_int(token) and token >= 0 for token in end_tokens):
        raise PromptError(f"the tokens that end a row must be several whole numbers of at least 0; got {end_tokens!r}")
    if not is_int(pad_token) or pad_token < 0:
        raise PromptError(f"pad_token must be a whole number of at least 0; got {pad_token!r}")
