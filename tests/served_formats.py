"""Until models can be served with formats, tests of planning say that they can."""

from __future__ import annotations

import pytest

from xkv_fx.formats import SLOT_FORMATS


def serve_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans with formats fit models whose layers can be stored so."""
    monkeypatch.setattr("xkv_fx.formats.SERVED_FORMATS", SLOT_FORMATS)
