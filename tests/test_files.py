"""Files that users hand around: whole or not at all when written, untrusted when read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xkv_fx import files
from xkv_fx.errors import FileFormatError
from xkv_fx.files import MAX_FILE_BYTES, is_int, read_json, read_sealed_json, write_json, write_sealed_json

KIND = "xkv_fx.something"
GOOD = {"format": KIND, "version": 1, "values": [1, 2.5, None, "é"]}


def read(path: Path) -> dict[str, Any]:
    return read_json(path, KIND, newest=2)


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("as_path", [str, Path])
def test_round_trip(tmp_path: Path, as_path: type) -> None:
    target = tmp_path / "a plan é.json"
    write_json(as_path(target), GOOD)
    assert read_json(as_path(target), KIND, newest=1) == GOOD
    assert target.read_bytes().endswith(b"}\n")


def test_write_into_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_json("plan.json", GOOD)
    assert read(tmp_path / "plan.json") == GOOD


def test_write_replaces_the_whole_of_an_older_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "plan.json", "x" * 10_000)
    write_json(path, GOOD)
    assert read(path) == GOOD
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object(), b"bytes"], ids=["nan", "inf", "object", "bytes"])
def test_failed_write_leaves_the_older_file_and_nothing_else(tmp_path: Path, bad: object) -> None:
    path = tmp_path / "plan.json"
    write_json(path, GOOD)
    with pytest.raises((TypeError, ValueError)):
        write_json(path, {"format": KIND, "version": 1, "first": "a" * 5000, "bad": bad})
    assert read(path) == GOOD
    assert os.listdir(tmp_path) == ["plan.json"]


def test_interrupted_write_leaves_the_older_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    write_json(path, GOOD)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {**GOOD, "version": 2})
    assert read(path) == GOOD
    assert os.listdir(tmp_path) == ["plan.json"]


def test_write_into_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_json(tmp_path / "missing" / "plan.json", GOOD)


def test_read_of_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing.json")


def test_every_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_json(path, GOOD)
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # the last byte is a line end, which says nothing
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=r"plan\.json: not valid JSON"):
            read(path)


@pytest.mark.parametrize(
    "text",
    ["[]", "1", "null", '"xkv_fx.something"', "{}", '{"version": 1}', '{"format": "xkv_fx.other", "version": 1}']
    + [json.dumps({"format": kind, "version": 1}) for kind in (None, 1, [KIND], {}, KIND + " ", KIND.upper())],
)
def test_another_format_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(FileFormatError, match=r"plan\.json: not a xkv_fx\.something file"):
        read(write_text(tmp_path / "plan.json", text))


@pytest.mark.parametrize("version", [None, True, False, 0, -1, 1.0, "1", [1]])
def test_version_that_is_no_positive_whole_number_is_refused(tmp_path: Path, version: object) -> None:
    path = write_text(tmp_path / "plan.json", json.dumps({"format": KIND, "version": version}))
    with pytest.raises(FileFormatError, match=r"plan\.json: its version .* is not a whole number of at least 1"):
        read(path)


def test_missing_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="version None"):
        read(write_text(tmp_path / "plan.json", json.dumps({"format": KIND})))


def test_older_versions_are_read_and_newer_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for version in (1, 2):
        write_json(path, {**GOOD, "version": version})
        assert read(path)["version"] == version
    write_json(path, {**GOOD, "version": 3})
    with pytest.raises(FileFormatError, match=r"version 3 is newer than 2.*upgrade xkv_fx"):
        read(path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_lacks_are_refused(tmp_path: Path, number: str) -> None:
    path = write_text(tmp_path / "plan.json", f'{{"format": "{KIND}", "version": 1, "value": {number}}}')
    with pytest.raises(FileFormatError, match=f"{number} is not a JSON number"):
        read(path)


@pytest.mark.parametrize("twice", ['"version": 1', '"value": {"a": 1, "b": 2, "a": 1}'])
def test_fields_given_twice_are_refused(tmp_path: Path, twice: str) -> None:
    path = write_text(tmp_path / "plan.json", f'{{"format": "{KIND}", "version": 1, {twice}}}')
    with pytest.raises(FileFormatError, match="is given twice"):
        read(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 64,
        b"\xff\xfe\xfd",
        b'{"format": "\xff"}',
        b"PK\x03\x04 an archive",
        b"\x80\x04\x95 a pickle",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"9" * 10_000,
        json.dumps(GOOD).encode() + b"{}",
    ],
    ids=[
        "empty",
        "zeros",
        "not-utf8",
        "bad-string",
        "archive",
        "pickle",
        "deep-list",
        "deep-object",
        "long-number",
        "two",
    ],
)
def test_what_is_not_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(raw)
    with pytest.raises(FileFormatError, match=r"plan\.json: not valid JSON"):
        read(path)


def test_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    text = json.dumps(GOOD)
    path.write_text(text + " " * (MAX_FILE_BYTES - len(text.encode())), encoding="utf-8")
    assert read(path) == GOOD
    with path.open("a") as file:
        file.write(" ")
    with pytest.raises(FileFormatError, match=rf"plan\.json: larger than {MAX_FILE_BYTES} bytes"):
        read(path)


def test_huge_file_is_refused_without_being_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.touch()
    os.truncate(path, 1 << 36)  # a hole: 64 GiB that take no disk
    with pytest.raises(FileFormatError, match="larger than"):
        read(path)


@pytest.mark.parametrize("value", [0, -3, 10**30, np.int8(1), np.uint64(2**63), np.array(4), torch.tensor(4)], ids=repr)
def test_is_int(value: object) -> None:
    assert is_int(value)


@pytest.mark.parametrize(
    "value",
    [
        True, False, np.True_, torch.tensor(True), torch.tensor(False), 1.0, np.float32(1), torch.tensor(1.0), "1",
        b"1", None, [1], np.array([1, 2]), torch.tensor([1]), 1j,
    ],
    ids=repr,
)  # fmt: skip
def test_is_not_int(value: object) -> None:
    assert not is_int(value)


def test_sealed_json_is_what_was_written_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "sealed.json"
    write_sealed_json(path, GOOD)
    assert read_sealed_json(path, KIND, 1) == GOOD
    text = path.read_text(encoding="utf-8")
    path.write_text(json.dumps(json.loads(text)), encoding="utf-8")  # written down in another way
    assert read_sealed_json(path, KIND, 1) == GOOD
    for changed in (text.replace("2.5", "2.25"), text.replace('"sha256"', '"sha255"')):
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(FileFormatError, match="does not match its checksum"):
            read_sealed_json(path, KIND, 1)
