"""Several processes, as torchrun starts them: what they measure together is what one measures alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exhaustive import exhaustive
from saved_models import save_model
from tiny_models import random_ids

from xkv_fx import Calibration, Profile

TESTS = Path(__file__).parent
PROCESSES = 2


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))), "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: str | Path) -> str:
    """What the processes print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(folder: Path, *jobs: str) -> list[dict[str, Any]]:
    """What each process found."""
    torchrun(TESTS / "distributed_program.py", folder, *jobs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results(tmp_path_factory.mktemp("processes"), "measuring", "errors")


def test_what_is_measured_together_is_what_one_measures_alone(found: list[dict[str, Any]]) -> None:
    first, second = (process["measuring"] for process in found)
    assert first["together"] == first["alone"] == second["together"]
    assert first["seen"] == [1, 2, 3]
    assert second["seen"] == [], "one of them reports"
    assert first["parts"] == 3


@exhaustive
def test_the_command_line_shares_prompts_among_processes(tmp_path: Path) -> None:
    texts = [tmp_path / f"{seed}.txt" for seed in range(3)]
    for seed, text in enumerate(texts):
        text.write_text(" ".join(f"w{token}" for token in random_ids(1, 60, seed)[0].tolist()))
    save_model(tmp_path / "model")
    given = ["--model", tmp_path / "model", *(part for text in texts for part in ("--prompts", text))]
    for command, kind in (("profile", Profile), ("calibrate", Calibration)):
        options = [*given, "--length", "30", "--json"]
        printed = torchrun("-m", "xkv_fx.cli", command, "--out", tmp_path / "together", *options)
        assert len(printed.splitlines()) == 1, "one of them prints"
        alone = [sys.executable, "-m", "xkv_fx.cli", command, "--out", tmp_path / "alone", *options]
        subprocess.run([*map(str, alone)], check=True, env=environment())
        assert kind.load(tmp_path / "together") == kind.load(tmp_path / "alone")
        assert sorted(path.name for path in tmp_path.glob("together*")) == ["together"]
    with pytest.raises(AssertionError, match="runs in one process"):
        torchrun("-m", "xkv_fx.cli", "verify", tmp_path / "no plan", *given)


def test_an_error_in_one_process_is_raised_in_all(found: list[dict[str, Any]]) -> None:
    first, second = (process["errors"] for process in found)
    assert second["in a round"] == ["PromptError", "not this one"]
    assert first["in a round"] == ["PromptError", "in process 1: not this one"]
    assert second["before"][0] == "FileExistsError"
    assert first["before"][0] == "XkvError"
    assert first["before"][1].startswith("in process 1: FileExistsError")
    for process in (first, second):
        assert process["other prompts"][0] == "BudgetError"
        assert "not given the same" in process["other prompts"][1]
        assert process["no group"][0] == "BudgetError"
