"""Reading and writing the files that users hand around. Everything read here is untrusted."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

from xkv_fx.errors import FileFormatError, MissingFileError

MAX_FILE_BYTES = 16 * 1024 * 1024
SEAL = "sha256"


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to; at the end, what is there replaces `path`, or `path` stays as it was.

    No half-written file is ever taken for a whole one.

    Raises:
        MissingFileError: the folder that it would be in does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise MissingFileError(f"{target} cannot be written: there is no folder {target.parent}; make it first")
    temporary = target.parent / f".{secrets.token_hex(8)}.part"  # unlike tempfile's, readable as the umask says
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def folder_written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `written_whole`, for a new folder. A folder that exists and is not empty is left alone, and is an error.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists; remove it, or choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{secrets.token_hex(8)}.part"
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_kept(folder: str | os.PathLike[str], suffix: str, *others: str) -> None:
    """Delete what was kept in a `resume` folder, and the folder unless something else is in it.

    Args:
        suffix: of the files that are named by a SHA-256, such as ".json".
        others: names of further files that were kept.
    """
    root = Path(folder)
    for path in root.glob(f"*{suffix}"):
        if re.fullmatch("[0-9a-f]{64}", path.stem):
            path.unlink()
    for name in others:
        (root / name).unlink(missing_ok=True)
    with suppress(OSError):
        root.rmdir()


def write_json(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write JSON; the file appears whole or not at all."""
    with written_whole(path) as temporary, open(temporary, "x", encoding="utf-8") as file:
        json.dump(data, file, indent=2, allow_nan=False)
        file.write("\n")


def check_format(header: Any, kind: str, newest: int, oldest: int = 1) -> dict[str, Any]:
    """The header of a file, if it is a JSON object whose `format` is `kind` and whose `version` is from `oldest`
    to `newest`.

    Raises:
        FileFormatError: it is not; the message does not name the file.
    """
    if not isinstance(header, dict) or header.get("format") != kind:
        raise FileFormatError(f"not a {kind} file")
    version = header.get("version")
    if not is_int(version) or version < 1:
        raise FileFormatError(f"its version {version!r} is not a whole number of at least 1")
    if version > newest:
        raise FileFormatError(
            f"format version {version} is newer than {newest}, the newest that is read here; upgrade xkv_fx"
        )
    if version < oldest:
        raise FileFormatError(
            f"format version {version} is older than {oldest}, the oldest that is read here; make the file again"
        )
    return header


def read_json(path: str | os.PathLike[str], kind: str, newest: int, oldest: int = 1) -> dict[str, Any]:
    """Read a JSON object whose `format` is `kind` and whose `version` is from `oldest` to `newest`.

    Raises:
        FileFormatError: too large, not JSON, another format, or a version that is not read.
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise FileFormatError(f"{name}: larger than {MAX_FILE_BYTES} bytes; this is not a {kind} file")
    try:
        data = parse_json(raw)
    except ValueError as error:
        raise FileFormatError(f"{name}: not valid JSON ({error}); was it cut off? Make it again.") from error
    try:
        return check_format(data, kind, newest, oldest)
    except FileFormatError as error:
        raise FileFormatError(f"{name}: {error}") from error


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text, refusing what JSON does not allow: numbers that are not finite, and fields given twice.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_duplicates
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_sealed_json(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write JSON that holds its own checksum; the file appears whole or not at all."""
    write_json(path, {**data, SEAL: checksum(data)})


def read_sealed_json(path: str | os.PathLike[str], kind: str, newest: int, oldest: int = 1) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote, as `read_json` does.

    Raises:
        FileFormatError: as `read_json`; or the content does not match its checksum.
    """
    data = read_json(path, kind, newest, oldest)
    if data.pop(SEAL, None) != checksum(data):
        raise FileFormatError(
            f"{os.fspath(path)}: its content does not match its checksum; it was damaged or changed. Make it again."
        )
    return data


def checksum(data: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, however it is formatted."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def check_safetensors_size(path: str | os.PathLike[str], largest: int) -> None:
    """Refuse, before anything is read, a safetensors file that is too large, or whose header is.

    Raises:
        FileFormatError: it is; the message does not name the file.
    """
    if os.stat(path).st_size > largest:
        raise FileFormatError(f"larger than {largest} bytes")
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_FILE_BYTES:
        raise FileFormatError(f"its header claims to be larger than {MAX_FILE_BYTES} bytes")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the field {name!r:.100} is given twice")
        fields[name] = value
    return fields


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.100} is too large a number")
    return value


def is_finite(value: object) -> TypeGuard[float]:
    """True for a float that is neither infinite nor NaN."""
    return isinstance(value, float) and math.isfinite(value)


def is_int(value: object) -> TypeGuard[int]:
    """True for a whole number, numpy's and torch's included, and False for a bool of any of them."""
    bool_of_torch = str(getattr(value, "dtype", "")) == "torch.bool"  # torch, which is not imported here, indexes by it
    several = getattr(value, "ndim", 0) != 0
    if isinstance(value, bool) or bool_of_torch or several:
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
