"""What an evaluation keeps while it runs: a sound part is taken again, any other is measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ready_models
import torch
from sealed_json import sealed

from xkv_fx import Budgets
from xkv_fx.errors import FileFormatError
from xkv_fx.evaluation.quality.candidates import Entry
from xkv_fx.evaluation.quality.parts import Parts
from xkv_fx.evaluation.quality.results import Row
from xkv_fx.evaluation.tasks import Instance

IDS = torch.tensor([[1, 2]])
MADE = (Instance(IDS, IDS, ("a",), 4), Instance(IDS, IDS, ("b",), 4))
ENTRY = Entry("uniform", "50.0%", Budgets((4, 4, 4)))
ROW = Row("uniform", "50.0%", Budgets((4, 4, 4)).policy, "words", "inside", 96, {"score": (0.5, 1.0)}, ("a", "b"))
ASKED = (ENTRY, "words", "inside", MADE)


def parts(folder: Path) -> Parts:
    return Parts(folder, ready_models.captured(), length=64, seed=0, room=8)


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_bytes": -1},
        {"kv_bytes": True},
        {"texts": ["a"]},
        {"texts": ["a", 1]},
        {"values": [0.5, 1.0]},
        {"values": {"kl": [0.5, 1.0]}},
        {"values": {"score": [0.5]}},
        {"values": {"score": [0.5, "1"]}},
        {"values": {"score": [0.5, 10**400]}},
        {"also": 1},
        {"texts": ...},
    ],
    ids=str,
)
def test_a_part_that_is_not_sound_is_measured_again(tmp_path: Path, changes: dict[str, Any]) -> None:
    parts(tmp_path).write(*ASKED, ROW)
    assert parts(tmp_path).read(*ASKED) == ROW
    (path,) = (path for path in tmp_path.iterdir() if path.name != "run.json")
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(sealed({name: value for name, value in data.items() if value is not ...})))
    assert parts(tmp_path).read(*ASKED) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": "64"}, "its field 'length' has the wrong type: '64'"),
        ({"seed": ...}, "it lacks 'seed'"),
        ({"also": 1}, "unknown field 'also'"),
        ({"seed": 1}, "seed 1 instead of 0"),
    ],
    ids=str,
)
def test_a_folder_whose_run_cannot_be_read_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    parts(tmp_path)
    path = tmp_path / "run.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))
    with pytest.raises(FileFormatError, match=message) as raised:
        parts(tmp_path)
    assert str(tmp_path) in str(raised.value)
