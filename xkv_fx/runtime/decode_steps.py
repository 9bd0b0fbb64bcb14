"""A tight loop of decode steps: no token leaves the device, and nothing stands between two steps but their choice."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from xkv_fx.errors import PromptError
from xkv_fx.files import is_int
from xkv_fx.runtime.choose_tokens import Choose


def decode_steps(
    step: Callable[[Tensor], Tensor],
    ids: Tensor,
    n: int,
    choose: Choose,
    end_tokens: Collection[int] = (),
    pad_token: int = 0,
) -> Tensor:
    """Feed `ids`, choose a token for each row, feed that, and so on, `n` times.

    Args:
        step: logits `[rows, 1, vocabulary]` of ids int64 `[rows, 1]`; see `Session.step`.
        end_tokens: a row is over once it has one of these, and is filled up with `pad_token`; whether all rows are over
            is looked at after every step, which on a GPU waits for it.

    Returns:
        the tokens that were chosen, int64 `[rows, n]`, fewer columns if every row is over. The last has not been fed.

    Raises:
        PromptError: `n` below 1; and whatever `step` raises.
    """
    if not is_int(n) or n < 1:
        raise PromptError(f"n must be a whole number of at least 1; got {n!r}")
    ends = torch.tensor(sorted(end_tokens), dtype=torch.int64, device=ids.device)
    over = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    tokens: list[Tensor] = []
    for _ in range(n):
        chosen = choose(step(ids)[:, -1])
        if end_tokens:
            chosen = chosen.masked_fill(over, pad_token)
            over = over | torch.isin(chosen, ends)
        ids = chosen[:, None]
        tokens.append(ids)
        if end_tokens and bool(over.all()):
            break
    return torch.cat(tokens, 1)
