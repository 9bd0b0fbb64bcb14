"""What the rows of a session have been fed: the one place where Python counts tokens, and where their ids are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

PADDING = -1
"""In a transcript: a column that holds no token of its row, because it was padding or the row has forgotten it."""
_FIRST_ROOM = 64


@dataclasses.dataclass(frozen=True)
class History:
    """Counts of each row. Graphs keep `seen` and `base` on their device too, where nobody may wait for them.

    Attributes:
        seen: valid tokens.
        base: how many of them had been seen when the last prompt or turn ended.
        fed: columns that were fed, padding included, the same for all rows: what transformers slices a conversation
            by.
    """

    seen: tuple[int, ...]
    base: tuple[int, ...]
    fed: int = 0

    @classmethod
    def empty(cls, rows: int) -> History:
        return cls((0,) * rows, (0,) * rows)

    def after_prompt(self, added: Sequence[int], columns: int) -> History:
        """After a prompt or a turn of so many valid tokens a row. A row without any stays as it was."""
        seen = tuple(before + new for before, new in zip(self.seen, added, strict=True))
        base = tuple(after if new else before for before, after, new in zip(self.base, seen, added, strict=True))
        return History(seen, base, self.fed + columns)

    def after_steps(self, steps: int = 1) -> History:
        """After so many decoded tokens a row."""
        return History(tuple(count + steps for count in self.seen), self.base, self.fed + steps)

    def without(self, rows: Sequence[int] | None) -> History:
        """After forgetting all tokens, or those of some rows."""
        if rows is None:
            return History.empty(len(self.seen))
        kept = [row not in rows for row in range(len(self.seen))]
        seen, base = (
            tuple(n * keep for n, keep in zip(counts, kept, strict=True)) for counts in (self.seen, self.base)
        )
        return History(seen, base, self.fed)

    def reordered(self, rows: Sequence[int]) -> History:
        """Row i becomes a copy of row `rows[i]`."""
        seen, base = (tuple(counts[row] for row in rows) for counts in (self.seen, self.base))
        return History(seen, base, self.fed)


class Transcript:
    """The ids that each row was fed; they show whether a conversation that is passed in again is still the same one.

    They lie on the session's device, so that no step waits for it, and take 4 bytes a column and row.

    Attributes:
        start: the first column whose ids are known; 0 but for sessions from files that have none.
    """

    def __init__(self, rows: int, device: torch.device, start: int = 0) -> None:
        self.start = start
        self._ids = torch.empty((rows, 0), dtype=torch.int32, device=device)
        self._columns = 0

    @classmethod
    def of(cls, ids: Tensor, start: int = 0) -> Transcript:
        """With these ids, as `ids` gives them."""
        transcript = cls(ids.shape[0], ids.device, start)
        transcript.add(ids)
        return transcript

    @property
    def ids(self) -> Tensor:
        """int32 `[rows, columns from start]`; `PADDING` where there is no token."""
        return self._ids[:, : self._columns]

    def add(self, ids: Tensor, valid: Tensor | None = None) -> None:
        """Note columns `[rows, S]` that were fed, and which of them are tokens; all are when None."""
        end = self._columns + ids.shape[1]
        if end > self._ids.shape[1]:
            self._make_room(end)
        place = self._ids[:, self._columns : end]
        place.copy_(ids)
        if valid is not None:
            place.masked_fill_(~valid, PADDING)
        self._columns = end

    def forget(self, rows: Sequence[int] | None) -> None:
        """All columns, or the tokens of some rows, whose columns stay."""
        if rows is None:
            self.start = self._columns = 0
        else:
            self.ids[list(rows)] = PADDING

    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row `rows[i]`."""
        self.ids.copy_(self.ids.index_select(0, rows.to(self._ids.device)))

    def clone(self) -> Transcript:
        """An independent copy."""
        return Transcript.of(self.ids, self.start)

    def difference(self, ids: Tensor | None, valid: Tensor | None) -> str | None:
        """How a conversation that should go on from these columns differs from them; None if it does not.

        Args:
            ids: int64 `[rows, >= columns]`, the whole conversation; None where only its mask is known.
            valid: bool `[rows, >= columns]`, False for padding; all are tokens when None.
        """
        held, known = self.ids, slice(self.start, self.start + self._columns)
        given = held.clamp(min=0) if ids is None else ids[:, known].to(held.device)
        if valid is not None:
            given = given.masked_fill(~valid[:, known].to(held.device), PADDING)
        wrong = held != given
        if not bool(wrong.any()):
            return None
        column = int(wrong.any(0).int().argmax())
        row = int(wrong[:, column].int().argmax())
        token, other = int(held[row, column]), int(given[row, column])
        where = f"column {self.start + column} of row {row}"
        if other == PADDING:
            return f"the attention mask says that {where} is padding, and it was fed as the token {token}"
        if token == PADDING:
            return f"{where} is a token by the attention mask, and was fed as padding, or forgotten by reset_rows"
        return f"{where} was fed as the token {token}, and is {other} in the conversation given"

    def _make_room(self, columns: int) -> None:
        """Room for so many columns and as many again, so that a session of n steps is copied only log(n) times."""
        with torch.inference_mode(False):  # where what is allocated could not be changed outside of it
            ids = self._ids.new_empty((self._ids.shape[0], max(_FIRST_ROOM, 2 * columns)))
        ids[:, : self._columns] = self.ids
        self._ids = ids
