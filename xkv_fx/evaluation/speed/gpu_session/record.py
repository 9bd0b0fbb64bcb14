"""What a stage has found: a file that is whole after every row, so that whatever ends a stage early leaves the rest."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from xkv_fx.errors import FileFormatError
from xkv_fx.files import written_whole

RUNNING, DONE, FAILED, STOPPED, LEFT_OUT = "running", "done", "failed", "stopped", "left out"


@dataclasses.dataclass
class Record:
    """One stage's file, `STAGE.json`.

    Attributes:
        folder: where it is.
        stage: its name.
        state: `"running"`, `"done"`, `"failed"`, `"stopped"` at its limit, or `"left out"` since no time was left.
        why: what went wrong, in one line; None where nothing did.
        seconds: that it took.
        rows: one for each thing that was measured.
    """

    folder: Path
    stage: str
    state: str = RUNNING
    why: str | None = None
    seconds: float = 0.0
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    _started: float = dataclasses.field(default_factory=time.perf_counter, repr=False)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.stage}.json"

    def add(self, **row: Any) -> None:
        """Note something that was measured: it is in the file, and on a line of standard output, at once."""
        self.rows.append(row)
        print(f"{self.stage}: {line_of(row)}", flush=True)
        self.seconds = time.perf_counter() - self._started
        self.save()

    def end(self, state: str, why: str | None = None, seconds: float | None = None) -> None:
        """Say how it ended."""
        self.state, self.why = state, why
        self.seconds = time.perf_counter() - self._started if seconds is None else seconds
        print(f"{self.stage}: {state}{'' if why is None else f': {why}'} ({self.seconds:.0f} s)", flush=True)
        self.save()

    def save(self) -> None:
        told = {name: getattr(self, name) for name in ("stage", "state", "why", "seconds", "rows")}
        with written_whole(self.path) as temporary:
            temporary.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, stage: str) -> Record:
        """The record of a stage that began; of one that did not, that it was left out.

        Raises:
            FileFormatError: the file is none.
        """
        record = cls(folder, stage, LEFT_OUT)
        if not record.path.is_file():
            return record
        try:
            told = json.loads(record.path.read_text(encoding="utf-8"))
            record.state, record.why, record.seconds = told["state"], told["why"], float(told["seconds"])
            record.rows = [dict(row) for row in told["rows"]]
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{record.path} is no record of a stage: {error!r:.200}") from error
        return record


def line_of(row: dict[str, Any]) -> str:
    """A row in one line, for people."""
    return ", ".join(f"{name} {_short(value)}" for name, value in row.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
