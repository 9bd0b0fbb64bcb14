"""The rows of a batch, each at a request of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xkv_fx.runtime.session import Program
from xkv_fx.runtime.state import State


class Rows:
    """A state whose rows come and go on their own, and the decode graph that takes them all one token further.

    A session counts columns that all rows share, keeps what each was fed, and refuses a step that one row has no room
    for. Here a row that is idle is started anew with each step, so that it never runs out of room, and what a row may
    take was checked before it came.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        with torch.inference_mode(False):
            self.state: State = program.plan.allocate()

    @property
    def count(self) -> int:
        return self._program.plan.rows

    def put(self, row: int, state: State) -> None:
        """Make a row what the only row of another state is."""
        self.state.take_row(row, state)

    def step(self, tokens: Sequence[int | None]) -> Tensor:
        """Feed each row its token, None for a row that is idle; returns the logits `[rows, vocabulary]`."""
        plan = self._program.plan
        counts = self.state.of(plan.counters)
        idle = [row for row, token in enumerate(tokens) if token is None]
        if idle:
            for counter in counts.values():
                counter[idle] = 0
        ids = torch.tensor([[token or 0] for token in tokens], dtype=torch.int64, device=plan.device)
        positions = counts["seen"][:, None].clone()
        return self._program.decode()(ids, positions, *self.state.tensors)[:, -1]
