"""Tests that are too long for every run; `make test-exhaustive` has them."""

from __future__ import annotations

import os

import pytest

EXHAUSTIVE = os.environ.get("XKV_FX_EXHAUSTIVE") == "1"
exhaustive = pytest.mark.skipif(not EXHAUSTIVE, reason="run by make test-exhaustive")
