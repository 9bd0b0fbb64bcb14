"""Room for appended tokens inside a limit in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int
from xkv_fx.layers import LayerSpec
from xkv_fx.policy import Policy

Whole = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Room:
    """What each layer is given besides its capacity.

    A layer with a sliding window is never given more slots than that. So there are capacities beside which the whole
    room is allocated, up to `caps`, and larger ones, which cost nothing more.

    Attributes:
        tokens: how many tokens are appended at most.
        slots: set aside for appended tokens, int64 `[layers]`.
        caps: the largest capacities beside which all of `slots` are allocated, int64 `[layers]`, at least 1.
        held: the most that the layers hold of the context, int64 `[layers]`.
    """

    tokens: int
    slots: Whole
    caps: Whole
    held: Whole

    def grown(self, capacities: Whole) -> Whole:
        """Capacities up to `caps`, made larger where that costs nothing."""
        return np.where(capacities == self.caps, self.held, capacities)


def make_room(layers: Sequence[LayerSpec], context: int, policy: Policy, max_new_tokens: int = 0) -> Room:
    """Room for `max_new_tokens` in every layer, where `policy` appends them; none otherwise.

    Raises:
        BudgetError: `max_new_tokens` is not a whole number of at least 0.
    """
    if not is_int(max_new_tokens) or max_new_tokens < 0:
        raise BudgetError(f"max_new_tokens must be a whole number of at least 0; got {max_new_tokens!r}")
    tokens = int(max_new_tokens) if policy.eviction == "append" else 0
    slots, caps, held = [], [], []
    for spec in layers:
        whole = spec.effective_capacity(context)
        most = spec.effective_capacity(whole + tokens)
        cap = min(whole, max(1, most - tokens))
        held.append(whole)
        caps.append(cap)
        slots.append(min(tokens, most - cap))
    return Room(tokens, np.array(slots, np.int64), np.array(caps, np.int64), np.array(held, np.int64))
