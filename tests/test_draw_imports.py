"""docs/draw_imports.py draws the package's imports, and nothing where they form a circle or point up."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from import_graph import ROOT, import_graph


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "path", [*sys.path])  # it adds tests/ to it
    return runpy.run_path(str(ROOT / "docs" / "draw_imports.py"))


def test_the_packages_imports_are_drawn(program: dict[str, Any], tmp_path: Path) -> None:
    assert program["faults"](import_graph()) == []
    program["main"](["--out", str(tmp_path / "imports.svg")])
    assert (tmp_path / "imports.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")


@pytest.mark.parametrize(
    ("imports", "fault"),
    [
        (
            [("xkv_fx.runtime.ops", "xkv_fx.api")],
            "xkv_fx.runtime.ops imports xkv_fx.api, which is not on a lower level",
        ),
        ([("xkv_fx.policy", "xkv_fx.formats")], "xkv_fx.policy imports xkv_fx.formats, which is not on a lower level"),
        (
            [("xkv_fx.hf.cache", "xkv_fx.hf.rotary"), ("xkv_fx.hf.rotary", "xkv_fx.hf.cache")],
            "these import each other in a circle: xkv_fx.hf.cache, xkv_fx.hf.rotary",
        ),
        (
            [
                ("xkv_fx.planning.data.curves", "xkv_fx.planning.solve.plan"),
                ("xkv_fx.planning.solve.fill", "xkv_fx.planning.data.hull"),
            ],
            "these import each other in a circle: planning.data, planning.solve",
        ),
    ],
    ids=["up", "sideways", "circle of modules", "circle of folders"],
)
def test_a_circle_or_an_arrow_up_is_refused(
    program: dict[str, Any],
    imports: list[tuple[str, str]],
    fault: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program["main"].__globals__["import_graph"] = lambda: nx.DiGraph(imports)
    with pytest.raises(SystemExit) as ended:
        program["main"](["--out", str(tmp_path / "imports.svg")])
    assert ended.value.code == 1
    assert fault in capsys.readouterr().err.splitlines()
    assert not (tmp_path / "imports.svg").exists()
