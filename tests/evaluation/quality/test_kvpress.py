"""What kvpress answers: asked of a program of its own, counted at equal bytes, kept, and refused when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xkv_fx.errors import BackendError
from xkv_fx.evaluation.quality.kvpress import Job, Kvpress, answers_of
from xkv_fx.evaluation.quality.results import CONTINUATION_TASK
from xkv_fx.evaluation.tasks import Instance

MADE = tuple(Instance(torch.tensor([[7, 8]]), torch.tensor([[9]]), (answer,), 4) for answer in ("1 2", "3"))


def program(folder: Path, *lines: str) -> Kvpress:
    """A stand-in for its Python: it keeps what it was asked in `asked.json`, and prints lines."""
    script = folder / "python"
    printed = "".join(f"echo '{line}'\n" for line in lines)
    script.write_text(f'#!/bin/sh\ncp "$3" {folder}/asked.json\necho loading\n{printed}echo "no such press" >&2\n')
    script.chmod(0o755)
    return Kvpress(script, "folder", None, (0.25, 1.0), ("snapkv",))


def ask(kvpress: Kvpress, *jobs: Job) -> list[Any]:
    asked = answers_of(kvpress, jobs, "float32", [2], lambda ids: " ".join(map(str, ids)), full_bytes=1000)
    return [row for _, row in asked]


def test_rows_of_what_it_answers(tmp_path: Path) -> None:
    answers = {"job": 0, "answers": [[1, 2], [4]]}
    strayed = {"kl": 0.5, "nll_change": -0.1, "agreement": 1}
    kvpress = program(tmp_path, json.dumps(answers), json.dumps({"job": 1, "answers": [strayed, strayed]}))
    (needle,) = kvpress.jobs("needle_single", "after", MADE)
    (text,) = kvpress.jobs(CONTINUATION_TASK, "inside", MADE)
    rows = ask(kvpress, needle, text)
    assert [(row.name, row.size, row.task, row.form) for row in rows] == [
        ("kvpress snapkv", "25.0%", "needle_single", "after"),
        ("kvpress snapkv", "25.0%", CONTINUATION_TASK, "inside"),
    ]
    assert rows[0].values == {"score": (1.0, 0.0)}
    assert rows[0].texts == ("1 2", "4")
    assert rows[1].values == {"kl": (0.5, 0.5), "nll_change": (-0.1, -0.1), "agreement": (1.0, 1.0)}
    assert [row.kv_bytes for row in rows] == [250, 250]
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert asked["ends"] == [2]
    example = {"context": [7, 8], "question": [9], "new_tokens": 4}
    assert asked["jobs"] == [
        {"press": "snapkv", "share": 0.25, "form": "after", "examples": [example, example]},
        {"press": "snapkv", "share": 0.25, "form": None, "examples": [example, example]},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "did not answer snapkv at 25.0% on needle_single: no such press"),
        ('{"job": 0, "answers": [[1]]}', "needle_single cannot be read: 1 answers to 2 examples"),
        ('{"job": 0, "answers": [[1], [-1]]}', "tokens of an answer must be a list"),
        ('{"job": 0, "answers": [[1], [NaN]]}', "NaN is not a JSON number"),
        ('{"job": 0}', "lacks 'answers'"),
        ('{"job": 1, "answers": [[1], [2]]}', "answers to job 1 instead of 0"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, line: str, message: str) -> None:
    kvpress = program(tmp_path, line)
    with pytest.raises(BackendError, match=message):
        ask(kvpress, *kvpress.jobs("needle_single", "inside", MADE))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    kvpress = Kvpress(tmp_path / "nowhere", "folder", None, (0.25,))
    assert [job.press for job in kvpress.jobs("needle_single", "inside", MADE)] == ["snapkv", "kvzip", "adakv"]
    with pytest.raises(BackendError, match=r"kvpress cannot be run by .*nowhere"):
        ask(kvpress, *kvpress.jobs("needle_single", "inside", MADE))
    with pytest.raises(BackendError, match="unknown presses zip; choose from snapkv, kvzip, adakv"):
        Kvpress(tmp_path, "folder", None, (0.25,), ("zip",))
