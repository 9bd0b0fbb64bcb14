"""Reading a prompt again: for scorers that ask how much a token is needed when the text is read a second time."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Reading:
    """How new tokens are fed to a scorer that reads them twice: the tokens, an instruction, and the tokens again.

    Only the first reading is kept; what the second one pays attention to is.

    Attributes:
        instruction: token ids between the two readings.
        chunk: a longer prompt is fed in pieces of so many columns, each read again before the next one comes.
    """

    instruction: tuple[int, ...]
    chunk: int

    @property
    def gap(self) -> int:
        """Tokens of the instruction."""
        return len(self.instruction)

    def twice(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and padding mask `[rows, 2 * S + gap]` of both readings, from those of one, `[rows, S]`.

        A row without tokens has no instruction either, and stays as it is.
        """
        between = torch.tensor(self.instruction, dtype=ids.dtype, device=ids.device).expand(ids.shape[0], -1)
        asked = valid.any(1)[:, None].expand_as(between)
        return torch.cat((ids, between, ids), 1), torch.cat((valid, asked, valid), 1)

    def tokens(self, columns: int) -> int:
        """Columns of both readings, from those of one."""
        return 2 * columns + self.gap

    def first(self, length: Tensor) -> Tensor:
        """Valid tokens of the first reading, int64 `[rows]`, from those of both."""
        return ((length - self.gap) // 2).clamp(min=0)
