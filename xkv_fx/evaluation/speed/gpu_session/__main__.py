"""A short session on a GPU: `python -m xkv_fx.evaluation.speed.gpu_session --minutes 12 --out FOLDER`.

Each stage runs in a process of its own, with a limit, and leaves a file `STAGE.json`; one that fails says why, and the
next begins. `--device cpu` is a dry run of small sizes: it shows that the program runs, and its figures say nothing
about a GPU. `python -m xkv_fx.evaluation.speed.gpu_session.report FOLDER` makes a table and a picture of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from xkv_fx.evaluation.speed.gpu_session.record import DONE, FAILED, LEFT_OUT, RUNNING, STOPPED, Record

# Shares of the session that a stage may take at most. They add up to more than 1: most stages take less.
LIMITS = {
    "machine": 0.2,
    "kernels": 0.25,
    "models": 0.25,
    "attention": 0.2,
    "steps": 0.5,
    "prefill": 0.25,
    "engine": 0.25,
}
_LEAST_SECONDS = 10.0  # below this, a stage's process would hardly have loaded torch


def run_stages(stages: list[str], out: Path, device: str, minutes: float) -> list[Record]:
    """Run stages one after another, each in a process of its own, until the time is up."""
    until = time.monotonic() + minutes * 60
    records = []
    for stage in stages:
        left = until - time.monotonic()
        record = Record(out, stage)
        if left < _LEAST_SECONDS:
            record.end(LEFT_OUT, "no time was left", 0.0)
        else:
            record.save()
            record = _run(stage, out, device, min(left, LIMITS[stage] * minutes * 60))
        records.append(record)
    return records


def _run(stage: str, out: Path, device: str, limit: float) -> Record:
    """The record of a stage, once its process has ended."""
    started = time.monotonic()
    command = [sys.executable, "-m", "xkv_fx.evaluation.speed.gpu_session.stage", stage, str(out), device]
    interpreted = {} if device == "cuda" else {"TRITON_INTERPRET": "1"}
    code: int | None = None
    process = subprocess.Popen(command, env={**os.environ, **interpreted})
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    record = Record.load(out, stage)
    if record.state != RUNNING:  # it has said itself how it ended, even if its process took longer to
        return record
    if code is None:
        record.end(STOPPED, f"after its limit of {limit:.0f} s", time.monotonic() - started)
    else:
        record.end(FAILED, f"its process ended with {code}", time.monotonic() - started)
    return record


def main(
    out: Annotated[Path, typer.Option(help="A folder for the results, a file for each stage.")],
    minutes: Annotated[float, typer.Option(help="All stages together take no longer.")] = 12.0,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a dry run of small sizes.")] = "cuda",
    only: Annotated[str | None, typer.Option(help=f"Some of the stages: {','.join(LIMITS)}.")] = None,
) -> None:
    """A short session on a GPU, in stages ordered by worth."""
    stages = list(LIMITS) if only is None else only.split(",")
    unknown = [stage for stage in stages if stage not in LIMITS]
    if unknown:
        raise typer.BadParameter(f"there is no stage {', '.join(unknown)}; choose from {', '.join(LIMITS)}")
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"device is cuda or cpu, not {device!r}")
    if not minutes > 0:
        raise typer.BadParameter(f"minutes must be above 0, not {minutes}")
    out.mkdir(parents=True, exist_ok=True)
    records = run_stages(stages, out, device, minutes)
    if any(record.state != DONE for record in records):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
