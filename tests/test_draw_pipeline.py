"""docs/draw_pipeline.py draws the way from prompts to a cache of fixed size, here with a small random model."""

from __future__ import annotations

import runpy
from pathlib import Path

from exhaustive import exhaustive
from import_graph import ROOT
from saved_models import save_model


@exhaustive
def test_the_picture_of_the_readme_can_be_drawn(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    program = runpy.run_path(str(ROOT / "docs" / "draw_pipeline.py"))
    picture = tmp_path / "pipeline.svg"
    sizes = ["--prompts", "1", "--tokens", "80"]
    program["main"](
        ["--model", str(tmp_path / "model"), *sizes, "--parts", str(tmp_path / "parts"), "--out", str(picture)]
    )
    text = picture.read_text(encoding="utf-8")
    assert text.rstrip().endswith("</svg>")
    assert "2 layers" in text, "the capacities of the graph are drawn"
