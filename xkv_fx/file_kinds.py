"""What one of our files is, for messages and for commands that take several kinds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from xkv_fx.errors import FileFormatError, MissingFileError
from xkv_fx.fields import HEADER
from xkv_fx.files import MAX_FILE_BYTES, parse_json

_PREFIX = "xkv_fx."
WORDS = {
    "budgets": "a plan, which xkv_fx.Budgets.load reads",
    "profile": "a profile, which xkv_fx.Profile.load reads and xkv_fx.solve makes a plan from",
    "calibration": "a calibration, which xkv_fx.Calibration.load reads and xkv_fx.solve makes a plan from",
    "session": "a session, which the load of a session of its model reads",
    "engine": "the manifest of an engine, whose folder xkv_fx.load reads",
}


def kind_of_file(path: str | os.PathLike[str]) -> str | None:
    """The format that a file gives itself, such as that of a plan; None for everything else. Nothing in it is trusted.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) == 8 and length <= MAX_FILE_BYTES:  # safetensors: the length of a header, and JSON
            header, place = file.read(length), HEADER
        else:
            header, place = start + file.read(MAX_FILE_BYTES), None
    try:
        data = parse_json(header)
        if place is not None:
            data = parse_json(data["__metadata__"][place])
    except (ValueError, KeyError, TypeError):
        return None
    kind = data.get("format") if isinstance(data, dict) else None
    known = isinstance(kind, str) and kind.startswith(_PREFIX) and kind.removeprefix(_PREFIX) in WORDS
    return kind if known else None


@contextmanager
def read_as(path: str | os.PathLike[str], expected: str) -> Iterator[None]:
    """While a file is read: if it is another kind of file of ours, or none at all, say that in place of what failed.

    Raises:
        FileFormatError: it was raised meanwhile, and `path` is of another kind than `expected`.
        MissingFileError: there is no file of that name.
    """
    name = os.fspath(path)
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"there is no file {name}") from error
    except FileFormatError as error:
        kind = kind_of_file(path)
        if kind is None or kind == expected:
            raise
        words = WORDS[kind.removeprefix(_PREFIX)]
        raise FileFormatError(f"{name}: not a {expected} file; it is {words}") from error
