"""A session on a GPU, run dry on a CPU: every stage leaves what it found, and what fails in one does not end it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from exhaustive import exhaustive
from typer.testing import CliRunner

from xkv_fx.errors import FileFormatError
from xkv_fx.evaluation.speed.gpu_session import __main__ as command
from xkv_fx.evaluation.speed.gpu_session import report, stage
from xkv_fx.evaluation.speed.gpu_session.record import Record
from xkv_fx.evaluation.speed.gpu_session.stages import STAGES

session, reporter = typer.Typer(), typer.Typer()
session.command()(command.main)
reporter.command()(report.main)


def test_every_stage_has_a_limit_and_is_run_in_order() -> None:
    assert list(STAGES) == list(command.LIMITS)


@pytest.mark.parametrize("name", ["machine", "models", pytest.param("steps", marks=exhaustive), "prefill"])
def test_a_stage_runs_dry(name: str, tmp_path: Path) -> None:
    record = stage.run_stage(name, tmp_path, "cpu")
    assert record.state == "done", record.why
    assert Record.load(tmp_path, name).rows == json.loads(json.dumps(record.rows))
    rows: dict[Any, dict[str, Any]] = {row.get("format", row.get("name")): row for row in record.rows}
    if name == "machine":
        assert record.rows[0]["copy_bytes_per_second"] > 0
    elif name == "models":
        assert rows["model"]["same_tokens"] == 1
        assert all(row["sessions_alike"] for row in record.rows)
        assert (
            rows["model"]["error"] < 1e-5 < rows["int8"]["error"] < rows["fp8"]["error"] < rows["int4"]["error"] < 0.1
        )
    elif name == "steps":
        assert set(rows) == {"full", "38.4%", "int4 at 38.4%", "int8", "int4", "transformers, dynamic"}
        assert rows["int4"]["kv_bytes"] < rows["int8"]["kv_bytes"] < rows["full"]["kv_bytes"]
        assert rows["full"]["to_full"] == 1
    else:
        assert set(rows) == {"ours", "transformers"}


@exhaustive
def test_a_whole_dry_run(tmp_path: Path) -> None:
    done = CliRunner().invoke(session, ["--out", str(tmp_path), "--device", "cpu", "--minutes", "10"])
    found = {name: Record.load(tmp_path, name) for name in STAGES}
    assert [record.why for record in found.values()] == [None] * len(STAGES)
    assert done.exit_code == 0
    assert found["engine"].rows[0]["same_tokens"]
    told = CliRunner().invoke(reporter, [str(tmp_path), "--picture", str(tmp_path / "gpu.svg")])
    assert told.exit_code == 0
    assert "0 of 8 wrote other bits than plain torch" in told.output
    assert (tmp_path / "gpu.svg").stat().st_size > 1000


def test_a_stage_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(record: Record, *_: object) -> None:
        record.add(found=1)
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setitem(STAGES, "machine", fails)
    stage.run_stage("machine", tmp_path, "cpu")
    record = Record.load(tmp_path, "machine")
    assert (record.state, record.why, record.rows) == ("failed", "RuntimeError: no such thing", [{"found": 1}])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    record = stage.run_stage("machine", tmp_path, "cuda")
    assert (record.state, record.rows) == ("failed", [])
    assert "no GPU" in str(record.why)


class Program:
    """What runs in the place of a stage: it notes a row, then does what it is told."""

    def __init__(self, then: str, told: str = "running") -> None:
        self.then, self.told = then, told

    def __call__(self, arguments: list[str], **options: Any) -> Any:
        name, out = arguments[3:5]
        told = {"stage": name, "state": self.told, "why": None, "seconds": 0, "rows": [{"found": 1}]}
        path = str(Path(out) / f"{name}.json")
        program = f"open({path!r}, 'w').write({json.dumps(told)!r}); import os, time; {self.then}"
        return self.popen([sys.executable, "-S", "-c", program], **options)

    popen = staticmethod(command.subprocess.Popen)


@pytest.mark.parametrize(
    ("then", "state", "why"),
    [
        ("os._exit(3)", "failed", "its process ended with 3"),
        ("time.sleep(60)", "stopped", "after its limit of 2 s"),
    ],
)
def test_a_stage_that_ends_early_leaves_what_it_found(
    then: str, state: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.subprocess, "Popen", Program(then))
    monkeypatch.setattr(command, "LIMITS", {"machine": 0.1, "kernels": 0.1})
    monkeypatch.setattr(command, "_LEAST_SECONDS", 0.0)
    found = command.run_stages(["machine"], tmp_path, "cpu", 1 / 3)
    assert [(record.state, record.why) for record in found] == [(state, why)]
    assert Record.load(tmp_path, "machine").rows == [{"found": 1}]


def test_a_stage_that_is_done_was_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its process, which has said so, takes longer to end than it may."""
    monkeypatch.setattr(command.subprocess, "Popen", Program("time.sleep(60)", "done"))
    monkeypatch.setattr(command, "LIMITS", {"machine": 0.1})
    monkeypatch.setattr(command, "_LEAST_SECONDS", 0.0)
    assert [record.state for record in command.run_stages(["machine"], tmp_path, "cpu", 1 / 3)] == ["done"]


def test_a_stage_for_which_no_time_is_left_is_left_out(tmp_path: Path) -> None:
    done = CliRunner().invoke(session, ["--out", str(tmp_path), "--device", "cpu", "--minutes", "0.01"])
    assert done.exit_code == 1
    assert {Record.load(tmp_path, name).state for name in STAGES} == {"left out"}
    told = CliRunner().invoke(reporter, [str(tmp_path)]).output
    assert told.count("left out, no time was left") == len(STAGES)


@pytest.mark.parametrize("wrong", [["--only", "machine,best"], ["--device", "tpu"], ["--minutes", "0"]], ids="=".join)
def test_what_makes_no_session_is_refused(wrong: list[str], tmp_path: Path) -> None:
    assert CliRunner().invoke(session, ["--out", str(tmp_path), *wrong]).exit_code == 2


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text('{"stage": "steps"}')
    with pytest.raises(FileFormatError, match=r"steps\.json is no record of a stage"):
        Record.load(tmp_path, "steps")
