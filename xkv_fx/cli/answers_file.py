"""Answers in a file that is whole or not there, and beside it those so far, from which an interrupted run goes on."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xkv_fx.errors import FileFormatError
from xkv_fx.files import MAX_FILE_BYTES, check_format, is_int, parse_json, written_whole

FORMAT = "xkv_fx.answers"
FORMAT_VERSION = 1
_FULL = (errno.ENOSPC, errno.EDQUOT)


class AnswersFile:
    """Answers as JSON lines, one a request and in their order.

    Those that have come are kept in `PATH.parts`, as they come, so that at most a line that was being written is lost.

    Args:
        path: the file that appears when all are there.
        made_of: identifies requests, settings, plan and model; answers to others are not taken.

    Attributes:
        done: the answers that are there, by request.

    Raises:
        FileFormatError: `PATH.parts` is something else, or of something else.
        FileExistsError: the answers are there already.
    """

    def __init__(self, path: Path, made_of: str) -> None:
        self.path = path
        self.parts = path.with_name(f"{path.name}.parts")
        self.done: dict[int, dict[str, Any]] = {}
        if self.parts.exists():
            self._take_up(made_of)
            return
        if path.exists():
            raise FileExistsError(f"{path} exists; remove it, or choose another file")
        header = {"format": FORMAT, "version": FORMAT_VERSION, "made_of": made_of}
        with written_whole(self.parts) as temporary:
            self._append(header, temporary)

    def add(self, index: int, record: Mapping[str, Any]) -> None:
        """Keep an answer."""
        line = {"index": index, **record}
        self._append(line, self.parts)
        self.done[index] = line

    def finish(self) -> None:
        """Put all answers in order where they belong, and remove what was kept beside."""
        try:
            with written_whole(self.path) as temporary, open(temporary, "x", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(self.done[index])}\n" for index in sorted(self.done))
        except OSError as error:
            raise self._explained(error) from error
        self.parts.unlink()

    def _append(self, line: Mapping[str, Any], path: Path) -> None:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> OSError:
        if error.errno not in _FULL:
            return error
        return OSError(
            f"the disk is full; make room and give the same command again: it goes on behind the {len(self.done)} "
            f"answers in {self.parts}"
        )

    def _take_up(self, made_of: str) -> None:
        """Read what an interrupted run left; a line that was cut off is removed."""
        whole = 0
        with open(self.parts, "rb") as file:
            while (line := file.readline(MAX_FILE_BYTES)).endswith(b"\n"):
                try:
                    found = parse_json(line)
                    self._check(found, made_of, first=whole == 0)
                except ValueError as error:
                    raise FileFormatError(f"{self.parts}: {error}; remove it, or choose another --out") from error
                whole = file.tell()
        if not whole:
            raise FileFormatError(f"{self.parts}: not a file of answers; remove it, or choose another --out")
        with open(self.parts, "r+b") as file:
            file.truncate(whole)

    def _check(self, found: Any, made_of: str, first: bool) -> None:
        if not first:
            index = found.get("index") if isinstance(found, dict) else None
            if not is_int(index) or index < 0:
                raise ValueError("a line of it is no answer")
            self.done[int(index)] = found
            return
        if check_format(found, FORMAT, FORMAT_VERSION).get("made_of") != made_of:
            raise ValueError("it holds answers to other requests, or of other settings, another plan or another model")
