"""Ragged batches: rows of unequal length in one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Sequence[Tensor], side: str, fill: int = 0, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids int64 `[rows, longest]` and their mask, bool of that shape, from rows `[1, length]`.

    Args:
        side: where the padding stands, `"left"` or `"right"`.
        fill: the token that stands for padding.
        width: the batch's length; the longest row's by default.
    """
    width = width or max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.int64)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        length = row.shape[1]
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[index, place], valid[index, place] = row[0], True
    return ids, valid


def positions_of(valid: Tensor) -> Tensor:
    """Position ids int64 that count each row's valid tokens from 0; padding has position 0."""
    return (valid.long().cumsum(1) - 1).masked_fill(~valid, 0)
