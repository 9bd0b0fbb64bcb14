"""docs/draw_pipeline.py draws what a real model gives."""

from __future__ import annotations

import runpy
from pathlib import Path

from exhaustive import exhaustive
from import_graph import ROOT


@exhaustive
def test_the_picture_of_the_readme_can_be_drawn(tmp_path: Path) -> None:
    program = runpy.run_path(str(ROOT / "docs" / "draw_pipeline.py"))
    picture = tmp_path / "pipeline.svg"
    program["main"](["--prompts", "1", "--tokens", "128", "--parts", str(tmp_path / "parts"), "--out", str(picture)])
    assert picture.read_text(encoding="utf-8").rstrip().endswith("</svg>")
