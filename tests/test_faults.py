"""Programs that are interrupted, killed, or run out of disk or memory: no half file is ever taken for a whole one, what
was finished is not done again, and the message says how many bytes were wanted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from exhaustive import exhaustive

import xkv_fx
from xkv_fx import Budgets

TESTS = Path(__file__).parent
WRITER = """
import sys
from xkv_fx import Budgets
small, large = Budgets((1,)), Budgets(tuple(range(1, 60_000)))
print("started", flush=True)
while True:
    small.save(sys.argv[1])
    large.save(sys.argv[1])
"""
FULL_DISK = """
import resource, signal, sys
from xkv_fx import Budgets
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
Budgets(tuple(range(1, 60_000))).save(sys.argv[1])
"""


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed_interrupts
    )


def heed_interrupts() -> None:
    """Jobs in the background of a shell are told to ignore SIGINT, and tell their own jobs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def visible(folder: Path) -> set[str]:
    """Names of what is no leftover of a program that was killed while it wrote."""
    return {path.name for path in folder.iterdir() if not (path.name.startswith(".") and path.suffix == ".part")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_plan_is_whole_whenever_its_writer_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "plan.json"
    writer = start("-c", WRITER, path)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "started\n"
    while not path.exists():
        pass
    for _ in range(20):
        assert Budgets.load(path).capacities in ((1,), tuple(range(1, 60_000)))
    writer.send_signal(number)
    writer.communicate()
    assert Budgets.load(path).capacities in ((1,), tuple(range(1, 60_000)))
    assert visible(tmp_path) == {"plan.json"}
    if number == signal.SIGINT:
        assert os.listdir(tmp_path) == ["plan.json"]


def test_a_full_disk_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Budgets((3, 4)).save(path)
    writer = start("-c", FULL_DISK, path)
    _, errors = writer.communicate()
    assert writer.returncode == 1
    assert "File too large" in errors
    assert Budgets.load(path).capacities == (3, 4)
    assert os.listdir(tmp_path) == ["plan.json"]


def run_through(job: str, folder: Path) -> list[str]:
    """What a job prints that nobody stops."""
    program = start(TESTS / "interrupted_program.py", job, folder)
    output, errors = program.communicate()
    assert program.returncode == 0, errors
    return output.splitlines()


def stop_after(job: str, folder: Path, steps: int, number: signal.Signals) -> None:
    """Stop a job once it has said that so many of its steps are done."""
    program = start(TESTS / "interrupted_program.py", job, folder)
    assert program.stdout is not None
    for line in program.stdout:
        if line == f"step {steps}\n":
            program.send_signal(number)
    assert program.wait() != 0


RESULTS = {
    "profile": "profile.safetensors", "calibrate": "calibration.safetensors", "export": "engine",
    "evaluate": "result.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


@exhaustive
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("job", list(RESULTS))
def test_a_stopped_job_leaves_nothing_half_and_ends_as_if_it_had_not_been(
    job: str, number: signal.Signals, tmp_path: Path, undisturbed: Path
) -> None:
    expected = undisturbed / RESULTS[job]
    if not expected.exists():
        run_through(job, undisturbed)
    steps = 1 if job == "export" else 2
    stop_after(job, tmp_path, steps, number)
    assert visible(tmp_path) <= {"parts"}
    parts = tmp_path / "parts"
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("[!.]*")}
    if job == "calibrate":
        assert len(kept) == steps
    assert run_through(job, tmp_path)[-1] == "done"
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    found = tmp_path / RESULTS[job]
    if job == "profile":
        assert xkv_fx.Profile.load(found) == xkv_fx.Profile.load(expected)
    elif job == "calibrate":
        assert xkv_fx.Calibration.load(found) == xkv_fx.Calibration.load(expected)
    elif job == "evaluate":
        assert found.read_text() == expected.read_text()
    else:
        assert xkv_fx.load(found, trust=True).budgets == Budgets((12, 16))


@exhaustive
@pytest.mark.parametrize(
    ("job", "result", "stops"), [("fit", "plan.json", (0, 1, 2)), ("answers", "answers.jsonl", (1, 2, 5))]
)
def test_a_job_that_is_killed_again_and_again_ends_with_the_same_file(
    job: str, result: str, stops: tuple[int, ...], tmp_path: Path, undisturbed: Path
) -> None:
    run_through(job, undisturbed)
    for steps in stops:
        stop_after(job, tmp_path, steps, signal.SIGKILL)
        assert not (tmp_path / result).exists()
    assert run_through(job, tmp_path)[-1] == "done"
    assert (tmp_path / result).read_bytes() == (undisturbed / result).read_bytes()


@exhaustive
def test_too_little_memory_says_how_many_bytes_the_plan_wanted(tmp_path: Path) -> None:
    wanted = (2_000_000_000 + 16) * 2 * (8 + 8) * 4
    said = "\n".join(run_through("memory", tmp_path))
    assert re.search(rf"needs {wanted:,} bytes of KV cache for 1 rows", said), said
