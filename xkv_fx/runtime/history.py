"""What the rows of a session have been fed: the one place where Python counts tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


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

    def after_step(self) -> History:
        """After one decoded token a row."""
        return History(tuple(count + 1 for count in self.seen), self.base, self.fed + 1)

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
