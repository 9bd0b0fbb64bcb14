"""The one check of fields that every format uses: exact names, types and ranges, and a message that names the field."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xkv_fx.errors import FileFormatError
from xkv_fx.fields import (
    ANYTHING,
    DOCUMENT,
    HEADER,
    LIST,
    NUMBER,
    OBJECT,
    TEXT,
    Field,
    check_fields,
    list_of,
    one_of,
    or_null,
    read_header,
    whole,
)  # fmt: skip

EXPECTED = {"name": TEXT, "count": whole(1), "share": or_null(NUMBER), "sizes": list_of(whole(0))}
GOOD = {"name": "a", "count": 1, "share": 0.5, "sizes": [0, 3]}


def changed(**changes: Any) -> dict[str, Any]:
    """`GOOD` with other fields; `...` takes a field out."""
    return {name: value for name, value in {**GOOD, **changes}.items() if value is not ...}


@pytest.mark.parametrize("data", [GOOD, changed(share=None), changed(share=3, sizes=[])])
def test_what_is_right_is_returned(data: dict[str, Any]) -> None:
    assert check_fields(data, EXPECTED) == data


NAMES = "count, name, share, sizes"


@pytest.mark.parametrize(
    ("data", "what", "message"),
    [
        (changed(name=3), "it", "its field 'name' has the wrong type: 3; it must be a string"),
        (changed(name=3), "the plan", "name of the plan has the wrong type: 3; it must be a string"),
        (changed(count=True), "it", "'count' has the wrong type: True; it must be a whole number of at least 1"),
        (changed(count=1.0), "it", "its field 'count' has the wrong type: 1.0"),
        (changed(count=0), "it", "its field 'count' must be a whole number of at least 1; got 0"),
        (changed(share="half"), "it", "'share' has the wrong type: 'half'; it must be a finite number, or null"),
        (changed(share=10**400), "it", "its field 'share' must be a finite number, or null; got 1000"),
        (changed(sizes=[0, -1]), "it", "'sizes' must be a list, each item a whole number of at least 0; got [0, -1]"),
        (changed(sizes={}), "it", "its field 'sizes' has the wrong type: {}"),
        (changed(sizes=[[]]), "layer 3", "sizes of layer 3 has the wrong type: [[]]"),
        (changed(name=...), "it", f"its fields are not {NAMES}: it lacks 'name'"),
        (changed(name=..., count=...), "layer 3", f"the fields of layer 3 are not {NAMES}: layer 3 lacks 'count', 'n"),
        (changed(also=1), "it", f"unknown field 'also'; its fields are {NAMES}. Is it of a newer xkv_fx?"),
        (changed(also=1, too=2), "layer 3", f"unknown fields 'also', 'too'; the fields of layer 3 are {NAMES}."),
        ([], "it", "it must be a JSON object, not list"),
        (None, "the plan", f"the fields of the plan are not {NAMES}: the plan must be a JSON object, not NoneType"),
    ],
)
def test_what_is_wrong_is_said_by_name(data: Any, what: str, message: str) -> None:
    with pytest.raises(FileFormatError, match=re.escape(message)):
        check_fields(data, EXPECTED, what)


def test_fields_that_may_be_left_out_are_checked_if_they_are_there() -> None:
    assert check_fields({}, EXPECTED, optional=EXPECTED) == {}
    assert check_fields(changed(name=...), EXPECTED, optional=("name",)) == changed(name=...)
    with pytest.raises(FileFormatError, match="'name' has the wrong type"):
        check_fields({"name": 1}, EXPECTED, optional=EXPECTED)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400, -(10**400), True, "1", None, [1]], ids=str)
def test_numbers_are_finite(number: Any) -> None:
    with pytest.raises(FileFormatError, match="'x'"):
        check_fields({"x": number}, {"x": NUMBER})


def test_names_to_choose_from() -> None:
    expected = {"x": one_of(("ring", "none"))}
    assert check_fields({"x": "ring"}, expected) == {"x": "ring"}
    for wrong, message in (("lru", "must be one of ring, none; got 'lru'"), (["ring"], "has the wrong type")):
        with pytest.raises(FileFormatError, match=message):
            check_fields({"x": wrong}, expected)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
SAMPLES: dict[str, tuple[Field, Any]] = {
    "anything": (ANYTHING, json_values),
    "text": (TEXT, st.text()),
    "number": (NUMBER, st.integers() | st.floats(allow_nan=False, allow_infinity=False)),
    "list": (LIST, st.lists(json_values, max_size=2)),
    "object": (OBJECT, st.dictionaries(st.text(), json_values, max_size=2)),
    "whole": (whole(), st.integers()),
    "size": (whole(0), st.integers(0)),
    "texts": (list_of(TEXT), st.lists(st.text(), max_size=2)),
    "size or null": (or_null(whole(0)), st.none() | st.integers(0)),
}


@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_each_field_takes_its_own_values(name: str, data: st.DataObject) -> None:
    field, values = SAMPLES[name]
    value = data.draw(values)
    assert check_fields({"x": value}, {"x": field}) == {"x": value} or value != value


@given(st.sampled_from(sorted(SAMPLES)), json_values)
def test_any_value_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    try:
        check_fields({"x": value}, {"x": SAMPLES[name][0]})
    except FileFormatError as error:
        if "its field 'x'" not in str(error):
            raise


def header(text: str) -> dict[str, Any]:
    return read_header({HEADER: text}, "xkv_fx.profile", 2, {"name": TEXT})


def test_headers() -> None:
    good = {"format": "xkv_fx.profile", "version": 2, "name": "a"}
    assert header(json.dumps(good)) == good
    for text, message in (
        ("{", "its metadata holds no JSON of a profile"),
        ("[" * 100_000, "its metadata holds no JSON of a profile"),
        (json.dumps({**good, "name": float("nan")}), "its metadata holds no JSON of a profile"),
        ('{"format": "xkv_fx.profile", "format": "xkv_fx.profile"}', "its metadata holds no JSON of a profile"),
        ("null", "not a xkv_fx.profile file"),
        (json.dumps({**good, "version": 3}), "newer than 2"),
        (json.dumps({**good, "name": 1}), "its field 'name' has the wrong type: 1"),
        (json.dumps({**good, "also": 1}), "unknown field 'also'"),
        (json.dumps({"format": "xkv_fx.profile", "version": 1}), "it lacks 'name'"),
    ):
        with pytest.raises(FileFormatError, match=message):
            header(text)
    with pytest.raises(FileFormatError, match="holds no JSON"):
        read_header(None, "xkv_fx.profile", 2, DOCUMENT)


def test_a_field_is_a_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TEXT.words = "another"  # type: ignore[misc]
