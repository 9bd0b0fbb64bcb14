"""How many examples the property tests draw: a few in every run, many times as many in `make fuzz`."""

from __future__ import annotations

import os

from hypothesis import settings

TIMES = int(os.environ.get("XKV_FX_FUZZ", "1"))


def examples(count: int) -> settings:
    """Draw so many examples in every run, and `XKV_FX_FUZZ` times as many when that is set."""
    return settings(max_examples=count * TIMES)
