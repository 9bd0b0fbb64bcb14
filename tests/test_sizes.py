"""Sizes and shares in words."""

from __future__ import annotations

from typing import Any

import pytest

from xkv_fx.errors import BudgetError
from xkv_fx.sizes import as_text, bytes_of, check_share, number_or_word, share_of


@pytest.mark.parametrize(
    ("word", "size"),
    [
        (20_000, 20_000),
        ("2GB", 2 * 1000**3),
        ("2 gb", 2 * 1000**3),
        ("1.5 GiB", 3 * 1024**3 // 2),
        (" 40MB ", 40_000_000),
        ("1kB", 1000),
        ("1KiB", 1024),
        (".5 MiB", 512 * 1024),
        ("3TB", 3 * 1000**4),
        ("1TiB", 1024**4),
        ("512B", 512),
        ("1.0005KB", 1000),  # whole bytes
        ("0.1GB", 100_000_000),  # exact, though 0.1 is no float
    ],
)
def test_sizes(word: Any, size: int) -> None:
    assert bytes_of(word, "kv_bytes") == size


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("38%", "'38%' is no size: a share of the full cache is given as fraction="),
        ("2G", 'write "2GB" .powers of 1,000. or "2GiB" .powers of 1,024.'),
        ("2 lightyears", "the unit 'lightyears' is unknown; take one of B, KB"),
        ("2000", "kv_bytes must be a number; got '2000'. As a string it has a unit, such as '2GB'"),
        ("2,000 B", "kv_bytes must be a number"),
        ("-2GB", "kv_bytes must be a number"),
        ("", "kv_bytes must be a number"),
        ("9" * 1000 + "GB", "kv_bytes must be a number"),
        ("\u0662GB", "kv_bytes must be a number"),
        (2e9, "must be a whole number; got 2000000000.0"),
        (True, "must be a number; got True"),
        (None, "must be a number; got None"),
    ],
)
def test_what_is_no_size(word: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        bytes_of(word, "kv_bytes")


@pytest.mark.parametrize(("word", "share"), [("38%", 0.38), ("38.4 %", 0.384), ("100%", 1.0), (0.25, 0.25), (1, 1.0)])
def test_shares(word: Any, share: float) -> None:
    assert share_of(word, "fraction") == share
    check_share(share, "fraction")


def test_what_is_no_share() -> None:
    with pytest.raises(
        BudgetError, match="fraction of '2GB' is no share; write \"38%\", and a size in bytes as kv_byt"
    ):
        share_of("2GB", "fraction")
    for value in (float("nan"), float("inf")):
        with pytest.raises(BudgetError, match="must be finite"):
            share_of(value, "fraction")
    for share in (0.0, -1.0, 101.0):
        with pytest.raises(BudgetError, match=rf"above 0 and at most 1; got {share}$"):
            check_share(share, "fraction")
    with pytest.raises(BudgetError, match=r"at most 1; got 38.4; did you mean 0.384, that is \"38.4%\"\?"):
        check_share(38.4, "fraction")


@pytest.mark.parametrize(
    ("text", "value"), [("2000", 2000), ("0.5", 0.5), ("2GB", "2GB"), ("38%", "38%"), ("nan", "nan")]
)
def test_on_a_command_line_numbers_need_no_unit(text: str, value: Any) -> None:
    assert number_or_word(text) == value or text == "nan"


def test_bytes_for_people() -> None:
    assert as_text(9_999) == "9,999 bytes"
    assert as_text(2 * 10**9) == "2,000,000,000 bytes (2.0 GB)"
    assert as_text(10**10) == "10,000,000,000 bytes (10.0 GB)"
