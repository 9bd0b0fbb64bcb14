"""Sizes and shares as people write them: `"2GB"`, `"1.5 GiB"`, `"38%"`.

KB, MB, GB and TB are powers of 1,000, KiB, MiB, GiB and TiB of 1,024.
"""

from __future__ import annotations

import math
import numbers
import re
from decimal import Decimal
from typing import Any

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int

_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_UNITS = {
    "b": 1,
    **{f"{letter}b": 1000**power for letter, power in _POWERS.items()},
    **{f"{letter}ib": 1024**power for letter, power in _POWERS.items()},
}
_WORD = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?|\.\d{1,30})\s*([A-Za-z%]*)\s*", re.ASCII)


def bytes_of(value: Any, name: str) -> int:
    """A size in bytes: a whole number, or a string with a unit. Of a fraction of a byte only whole ones count.

    Args:
        name: of the argument, for messages.

    Raises:
        BudgetError: neither, a unit that means two things, or a share.
    """
    if isinstance(value, str):
        number, unit = _parts(value, name, "2GB")
        if unit.lower() not in _UNITS:
            raise BudgetError(f"{name} of {value!r:.100} is no size: {_why_no_size(number, unit)}")
        return int(number * _UNITS[unit.lower()])
    _check_number(value, name)
    if not is_int(value):
        raise BudgetError(f'{name} must be a whole number; got {value!r}, and "2GB" would do, too')
    return int(value)


def share_of(value: Any, name: str) -> float:
    """A share as a plain finite number: from a number, or from a string such as `"38%"`. Its range is not checked.

    Args:
        name: of the argument, for messages.

    Raises:
        BudgetError: neither.
    """
    if isinstance(value, str):
        number, unit = _parts(value, name, "38%")
        if unit != "%":
            raise BudgetError(f'{name} of {value!r:.100} is no share; write "38%", and a size in bytes as kv_bytes=')
        return float(number / 100)
    _check_number(value, name)
    if not math.isfinite(value):
        raise BudgetError(f"{name} must be finite; got {value!r}")
    return float(value)


def check_share(share: float, name: str) -> None:
    """Refuse what is no share above 0 and at most 1; for 38.4, say what was probably meant.

    Raises:
        BudgetError: as said.
    """
    if 0 < share <= 1:
        return
    meant = f'; did you mean {share / 100:.6g}, that is "{share:.6g}%"?' if 1 < share <= 100 else ""
    raise BudgetError(f"{name} must be above 0 and at most 1; got {share!r}{meant}")


def number_or_word(text: str) -> float | str:
    """What is given on a command line: a number where it is one, and otherwise a word for the functions above."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def as_text(size: int) -> str:
    """A number of bytes for people: exact, with a larger unit beside it where that is easier to read."""
    for unit, factor in (("GB", 1000**3), ("MB", 1000**2), ("KB", 1000)):
        if size >= max(factor, 10_000):
            return f"{size:,} bytes ({size / factor:,.1f} {unit})"
    return f"{size:,} bytes"


def _parts(text: str, name: str, example: str) -> tuple[Decimal, str]:
    found = _WORD.fullmatch(text)
    if found is None or not found[2]:
        raise BudgetError(f"{name} must be a number; got {text!r:.100}. As a string it has a unit, such as {example!r}")
    return Decimal(found[1]), found[2]


def _why_no_size(number: Decimal, unit: str) -> str:
    if unit == "%":
        return "a share of the full cache is given as fraction="
    if unit.lower() in _POWERS:
        prefix = unit.upper()
        return f'write "{number}{prefix}B" (powers of 1,000) or "{number}{prefix}iB" (powers of 1,024)'
    return f"the unit {unit!r:.40} is unknown; take one of B, KB, MB, GB, TB, KiB, MiB, GiB and TiB"


def _check_number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BudgetError(f"{name} must be a number; got {value!r:.100}")
