"""Checking the fields of what a file holds: their names, types and ranges. Everything read here is untrusted.

Each format says by a `Field` what each of its fields may hold. Type annotations are not used for this: they are for
readers and type checkers, and a value may be stored in a different form from the one that it has in memory.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from xkv_fx.errors import FileFormatError
from xkv_fx.files import check_format, is_finite, is_int, parse_json

HEADER = "xkv_fx"
"""The key of our JSON in the metadata of a safetensors file."""


@dataclasses.dataclass(frozen=True)
class Field:
    """What a field may hold.

    Attributes:
        words: what it must be, for messages.
        right_type: whether a JSON value has the right type.
        in_range: whether a value of that type is in its range.
    """

    words: str
    right_type: Callable[[Any], bool]
    in_range: Callable[[Any], bool] = lambda value: True


Fields = Mapping[str, Field]

ANYTHING = Field("anything", lambda value: True)
"""For a field that is checked by the object built from it."""
TEXT = Field("a string", lambda value: isinstance(value, str))
NUMBER = Field(
    "a finite number",
    lambda value: is_int(value) or is_finite(value),
    lambda value: abs(value) <= sys.float_info.max,  # a whole number can be too large for a float
)
LIST = Field("a list", lambda value: isinstance(value, list))
OBJECT = Field("a JSON object", lambda value: isinstance(value, dict))


def whole(least: int | None = None) -> Field:
    """A whole number, of at least `least` if that is given."""
    if least is None:
        return Field("a whole number", is_int)
    return Field(f"a whole number of at least {least}", is_int, lambda value: bool(value >= least))


def one_of(names: Collection[str]) -> Field:
    """One of these strings."""
    return Field(f"one of {', '.join(names)}", TEXT.right_type, lambda value: value in names)


def or_null(field: Field) -> Field:
    """What `field` may hold, or null."""
    return Field(
        f"{field.words}, or null",
        lambda value: value is None or field.right_type(value),
        lambda value: value is None or field.in_range(value),
    )


def list_of(item: Field) -> Field:
    """A list of what `item` may hold."""
    return Field(
        f"a list, each item {item.words}",
        lambda value: isinstance(value, list) and all(map(item.right_type, value)),
        lambda value: all(map(item.in_range, value)),
    )


DOCUMENT: Fields = {"format": TEXT, "version": whole(1)}
"""What every file states; `check_format` looks at the values."""


def check_fields(
    data: Any, expected: Fields, what: str = "it", optional: Collection[str] = (), unknown: str | None = None
) -> dict[str, Any]:
    """A JSON object, if it has exactly the expected fields, and each holds what it may.

    Args:
        data: what was read.
        expected: all fields that there may be.
        what: the object's name in messages; "it" is the file.
        optional: fields that may be left out.
        unknown: what messages call unknown fields, such as "policy fields".

    Raises:
        FileFormatError: it does not; the message names the field, and not the file.
    """
    if not isinstance(data, dict):
        raise FileFormatError(
            f"{_fields_of(what)} are not {_named(expected)}: {what} must be a JSON object, not {type(data).__name__}"
        )
    strange = sorted(set(data) - set(expected))
    if strange:
        called = unknown or ("field" if len(strange) == 1 else "fields")
        raise FileFormatError(
            f"unknown {called} {_listed(strange)}; {_fields_of(what)} are {_named(expected)}. Is it of a newer xkv_fx?"
        )
    refuse_missing(data, expected, what, optional)
    for name, value in data.items():
        _check_value(value, expected[name], f"its field {name!r}" if what == "it" else f"{name} of {what}")
    return data


def refuse_missing(data: Collection[str], expected: Fields, what: str = "it", optional: Collection[str] = ()) -> None:
    """Refuse an object that lacks some of the expected fields; `check_fields` does so, too.

    Raises:
        FileFormatError: it lacks some; the message names them, and not the file.
    """
    missing = sorted(set(expected) - set(data) - set(optional))
    if missing:
        raise FileFormatError(f"{_fields_of(what)} are not {_named(expected)}: {what} lacks {_listed(missing)}")


def read_header(
    metadata: Mapping[str, str] | None,
    kind: str,
    newest: int,
    expected: Fields,
    oldest: int = 1,
    since: Mapping[int, Fields] | None = None,
) -> dict[str, Any]:
    """Our JSON from a safetensors file's metadata, its format, version and fields checked.

    Args:
        metadata: of the file.
        kind: the format, such as "xkv_fx.profile".
        newest, oldest: versions that are read.
        expected: its fields, besides those of `DOCUMENT`.
        since: what else files hold from a version on.

    Raises:
        FileFormatError: the metadata is not what was expected; the message does not name the file.
    """
    try:
        header = parse_json((metadata or {}).get(HEADER, ""))
    except ValueError as error:
        raise FileFormatError(f"its metadata holds no JSON of a {kind.rpartition('.')[2]}") from error
    header = check_format(header, kind, newest, oldest)
    fields = {**DOCUMENT, **expected}
    for version, added in (since or {}).items():
        fields |= added if header["version"] >= version else {}
    return check_fields(header, fields)


def _check_value(value: Any, field: Field, name: str) -> None:
    if not field.right_type(value):
        raise FileFormatError(f"{name} has the wrong type: {value!r:.100}; it must be {field.words}")
    if not field.in_range(value):
        raise FileFormatError(f"{name} must be {field.words}; got {value!r:.100}")


def _fields_of(what: str) -> str:
    return "its fields" if what == "it" else f"the fields of {what}"


def _named(expected: Fields) -> str:
    return ", ".join(sorted(expected))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"{name!r:.100}" for name in names)
