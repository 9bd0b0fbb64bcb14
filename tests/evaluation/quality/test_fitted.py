"""What `fit` finds beside its rivals on text of another kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from xkv_fx.evaluation.quality import fitted
from xkv_fx.planning.measure import calibrate, held_out


@pytest.fixture(autouse=True)
def _small(on_table_model: Callable[[ModuleType], None]) -> None:
    on_table_model(fitted)


def run(out: Path) -> Any:
    options = "--fractions 0.6 --context 120 --prompts 4 --unseen 2 --seconds 1000 --dtype float32"
    fitted.main(["--out", str(out), *options.split()])
    return json.loads((out / "fitted.json").read_text())["limits"]["60.0%"]


def test_the_plan_is_measured_where_it_was_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path)
    chosen = found["unseen"][0]
    limit = found["fit"]["limit"]
    names = [rival["name"] for rival in found["unseen"]]
    assert chosen["name"] == found["fit"]["candidates"][0]["name"]
    assert chosen["kv_bytes"] == found["fit"]["candidates"][0]["kv_bytes"]
    assert {f"capacities by layer, {how}, model" for how in ("append", "ring")} <= set(names)
    assert {"uniform, model, append", "all tokens, int8, append", "all tokens, int4, append"} <= set(names)
    assert all(rival["kv_bytes"] <= limit and len(rival["kl"]) == 2 for rival in found["unseen"])
    for rival in found["unseen"][1:]:
        assert rival["ratio"][0] == pytest.approx(chosen["mean"] / rival["mean"])
    text = (tmp_path / "fitted.md").read_text()
    assert f"| **fit**: {chosen['name']} | {chosen['kv_bytes']:,} |" in text
    assert text.startswith("60.0% of a full float32 cache of 120 tokens; 4 prompts of documentation")

    for module, name in ((calibrate, "_measure"), (held_out, "run_full")):
        monkeypatch.setattr(module, name, None)
    again = run(tmp_path)
    assert again["unseen"] == found["unseen"], "everything was kept"


def test_rivals_are_compared_by_pairs() -> None:
    kl = np.array([[0.1, 0.2], [0.2, 0.4]])
    chosen, other = fitted.rivals_of(["ours", "theirs"], [10, 9], kl)
    assert (chosen.ratio, other.kl) == ((1.0, 1.0, 1.0), (0.2, 0.4))
    assert other.ratio == pytest.approx((0.5, 0.5, 0.5))
