"""What the files of profiles and calibrations have in common: a header of JSON in a safetensors file's metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import safetensors

from xkv_fx.errors import BudgetError, FileFormatError
from xkv_fx.files import check_format

HEADER = "xkv_fx"  # the key of our JSON in the file's metadata


@contextmanager
def reading(path: str | os.PathLike[str], again: str) -> Iterator[None]:
    """Whatever is wrong with a file's content is said with its name, and what to do.

    Args:
        again: how to get another one, such as "Profile again.".

    Raises:
        FileFormatError: a FileFormatError, BudgetError or SafetensorError was raised meanwhile.
    """
    name = os.fspath(path)
    try:
        yield
    except safetensors.SafetensorError as error:
        raise FileFormatError(f"{name}: not a whole safetensors file ({error}); was it cut off? {again}") from error
    except (FileFormatError, BudgetError) as error:
        raise FileFormatError(f"{name}: {error!s:.1000}") from error


def read_header(metadata: dict[str, str] | None, kind: str, newest: int, fields: Mapping[str, type]) -> dict[str, Any]:
    """Our JSON from the file's metadata, with format, version and the types of its fields checked.

    Raises:
        FileFormatError: it is not as said; the message does not name the file.
    """
    try:
        header = json.loads((metadata or {}).get(HEADER, ""))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"its metadata holds no JSON of a {kind.rpartition('.')[2]}") from error
    header = check_format(header, kind, newest)
    if set(header) != set(fields):
        raise FileFormatError(f"its fields are {', '.join(sorted(header))} instead of {', '.join(sorted(fields))}")
    for name, expected in fields.items():
        if not isinstance(header[name], expected):
            raise FileFormatError(f"its field {name!r} has the wrong type: {header[name]!r:.100}")
    return header
