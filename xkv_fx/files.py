"""Reading and writing the files that users hand around. Everything read here is untrusted."""

from __future__ import annotations

import json
import math
import operator
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from xkv_fx.errors import FileFormatError

MAX_FILE_BYTES = 16 * 1024 * 1024


def write_json(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write JSON beside `path` and rename it into place, so that no half-written file is ever taken for a whole one."""
    target = Path(path)
    temporary = target.parent / f".{secrets.token_hex(8)}.part"  # unlike tempfile's, readable by whom the umask lets
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            json.dump(data, file, indent=2, allow_nan=False)
            file.write("\n")
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: str | os.PathLike[str], kind: str, newest: int) -> dict[str, Any]:
    """Read a JSON object whose `format` is `kind` and whose `version` is at most `newest`.

    Raises:
        FileFormatError: too large, not JSON, another format, or a newer version.
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise FileFormatError(f"{name}: larger than {MAX_FILE_BYTES} bytes; this is not a {kind} file")
    try:
        data = json.loads(raw, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{name}: not valid JSON ({error}); was it cut off? Make it again.") from error
    if not isinstance(data, dict) or data.get("format") != kind:
        raise FileFormatError(f"{name}: not a {kind} file")
    version = data.get("version")
    if not is_int(version) or version < 1:
        raise FileFormatError(f"{name}: its version {version!r} is not a whole number of at least 1")
    if version > newest:
        raise FileFormatError(
            f"{name}: format version {version} is newer than {newest}, the newest that is read here; upgrade xkv_fx"
        )
    return data


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def is_int(value: object) -> TypeGuard[int]:
    """True for a whole number, numpy's included, and False for a bool."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
