"""The plain loop of generation: feed a prompt or a turn to a session, choose a token for each row, decode, repeat."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from xkv_fx.errors import PromptError
from xkv_fx.files import is_int
from xkv_fx.runtime.session import Session


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each row, int64 `[rows]`, from logits `[rows, vocabulary]`."""
    return logits.argmax(-1)


def generate_tokens(
    session: Session,
    ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    choose: Callable[[Tensor], Tensor] = likeliest,
    end_tokens: Collection[int] = (),
    pad_token: int = 0,
) -> Tensor:
    """Feed `ids` int64 `[rows, S]`, and decode behind them. The last token that is returned has not been fed.

    Args:
        attention_mask: `[rows, S]`, 0 for padding before or after a row's tokens.
        choose: tokens int64 `[rows]` from logits `[rows, vocabulary]`.
        end_tokens: a row is over once it has one of these, and is filled up with `pad_token`.

    Returns:
        int64 `[rows, S + new]`; new ends when every row is over, after `max_new_tokens` at most.

    Raises:
        PromptError: `max_new_tokens` below 1, a row of padding only, or as `Session.feed`.
        CapacityError: as `Session.feed`.
    """
    if not is_int(max_new_tokens) or max_new_tokens < 1:
        raise PromptError(f"max_new_tokens must be a whole number of at least 1; got {max_new_tokens!r}")
    valid = None if attention_mask is None else attention_mask != 0
    if valid is not None and not bool(valid.any(-1).all()):
        raise PromptError("a row of the prompt is nothing but padding; give every row at least one token")
    logits = session.feed(ids, valid=valid)
    ends = torch.tensor(sorted(end_tokens), dtype=torch.int64, device=ids.device)
    over = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    tokens = [ids]
    for _ in range(max_new_tokens):
        if len(tokens) > 1:
            logits = session.step(tokens[-1])
        chosen = choose(logits[:, -1])
        if end_tokens:
            chosen = chosen.masked_fill(over, pad_token)
            over = over | torch.isin(chosen, ends)
        tokens.append(chosen[:, None])
        if bool(over.all()):
            break
    return torch.cat(tokens, 1)
