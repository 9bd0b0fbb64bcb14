"""The table of the paper's sentence: which plans it has, what it says of them, and that it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from xkv_fx.evaluation.quality import evaluate, paper, sources
from xkv_fx.evaluation.texts import documentation, source_code
from xkv_fx.planning.measure import calibrate, held_out


@pytest.fixture(autouse=True)
def _small(on_table_model: Callable[[ModuleType], None], monkeypatch: pytest.MonkeyPatch) -> None:
    on_table_model(paper)
    texts = {"documentation": documentation()[:20_000], "source code": source_code()[:20_000]}
    monkeypatch.setattr(sources, "KINDS", {kind: lambda text=text: text for kind, text in texts.items()})


def run(out: Path) -> dict[str, Any]:
    paper.main(["--out", str(out), "--prompts", "1", "--context", "160"])
    found: dict[str, Any] = json.loads((out / "paper.json").read_text())
    return found


def test_one_table_of_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows)[:4] == ["full", "joint by head", "joint", "calibrated"]
    single = list(rows)[4]
    assert single.startswith("all ")
    assert list(rows)[5:] == ["uniform"]
    assert (rows["full"]["share"], rows["full"]["bits"], rows["full"]["mean_kl"]) == (1.0, 16, 0.0)
    for name in ("joint by head", "joint", "calibrated", single, "uniform"):
        assert 0.37 < rows[name]["share"] <= 0.384
        assert len(rows[name]["kl"]) == 2, "one prompt of each kind"
        assert set(rows[name]["needles"]) == {"needle_single", "needle_multi_key", "needle_multi_value"}
    others = [plan for plan in found["plans"] if plan.startswith("all ") and plan != single]
    assert len(others) == 2, "the best of three"
    asked = {(row["name"], row["task"], row["form"]): row["means"]["score"] for row in found["needles"]["rows"]}
    assert rows["joint"]["needles"]["needle_single"] == [
        asked["joint", "needle_single", "inside"], asked["joint", "needle_single", "after"],
    ]  # fmt: skip
    text = (tmp_path / "paper.md").read_text()
    assert text.startswith("61.6% less memory than a full bfloat16 cache, eviction='append'")
    assert f"| joint | {rows['joint']['share']:.1%} | {rows['joint']['bits']:.2f} |" in text
    ratio = np.mean(rows["joint by head"]["kl"]) / np.mean(rows["uniform"]["kl"])
    assert f"mean KL of joint by head against uniform, with its paired 95 % interval: {ratio - 1:+.0%} [" in text

    for module, name in ((calibrate, "_measure"), (held_out, "run_full"), (evaluate, "_measure")):
        monkeypatch.setattr(module, name, None)
    again = run(tmp_path)
    assert again["rows"] == found["rows"], "everything was kept"
