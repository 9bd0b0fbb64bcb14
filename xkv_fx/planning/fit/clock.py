"""The time that a fit may take, and what was decided by it, so that a run that goes on decides the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xkv_fx.errors import FileFormatError
from xkv_fx.files import read_sealed_json, write_sealed_json

FORMAT = "xkv_fx.fit_decisions"
VERSION = 1


class Clock:
    """Seconds since the fit began.

    Args:
        seconds: that it may take; None for as many as it needs.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._start = time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self._start

    def within(self, share: float) -> bool:
        """Whether less than this share of the time is spent."""
        return self._seconds is None or self.spent < share * self._seconds

    def times_until(self, share: float, seconds: float, most: int) -> int:
        """How often something that takes so many seconds can be done until this share of the time is spent, at most
        `most` times."""
        return most if self._seconds is None else _fitting(share * self._seconds - self.spent, seconds, most)

    def times_in(self, share: float, seconds: float, most: int) -> int:
        """As `times_until`, in a share of the whole time, whenever that is."""
        return most if self._seconds is None else _fitting(share * self._seconds, seconds, most)


def _fitting(whole: float, seconds: float, most: int) -> int:
    return max(0, min(most, int(whole // max(seconds, 1e-3))))


class Decisions:
    """Numbers that a run chose by the clock. One that goes on where it was stopped reads them, so that it ends with
    the same plan.

    Args:
        file: where they are kept; in memory alone when None.
        settings: of the fit; decisions under other settings are not read.
    """

    def __init__(self, file: Path | None, settings: dict[str, Any]) -> None:
        self._file = file
        self._settings = settings
        self._made: dict[str, int] = {}
        if file is not None and file.is_file():
            try:
                data = read_sealed_json(file, FORMAT, VERSION)
            except FileFormatError:
                return  # damaged: decided again
            if data.get("settings") == settings:
                self._made = data["made"]

    def decide(self, name: str, choose: Callable[[], int]) -> int:
        """The number of that name: what was chosen before, or is now."""
        if name not in self._made:
            self._made[name] = choose()
            if self._file is not None:
                data = {"format": FORMAT, "version": VERSION, "settings": self._settings, "made": self._made}
                write_sealed_json(self._file, data)
        return self._made[name]
