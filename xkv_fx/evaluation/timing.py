"""Timing from outside: a generation, through the streamer that `generate` takes, calls in turns, and processes."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from xkv_fx.evaluation.machine import seconds


class Stopwatch(BaseStreamer):
    """Notes when the prompt went in and when each token came out; seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""

    @property
    def prefill(self) -> float:
        """From the prompt to the first token."""
        return self.times[1] - self.times[0]

    @property
    def per_token(self) -> float:
        """Median time between two tokens after the first."""
        steps = [after - before for before, after in zip(self.times[1:], self.times[2:], strict=False)]
        return statistics.median(steps)


def medians_in_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | None = None
) -> dict[str, float]:
    """Median milliseconds of each, run one after another in every round; a first round is not counted.

    Args:
        device: that they run on; the CPU when None.
    """
    where = device or torch.device("cpu")
    times: dict[str, list[float]] = {name: [] for name in runs}
    errors = Console(stderr=True)
    for _ in track(range(rounds + 1), "rounds", console=errors, disable=not errors.is_terminal):
        for name, run in runs.items():
            times[name].append(seconds(run, where))
    return {name: statistics.median(taken[1:]) * 1e3 for name, taken in times.items()}


def process_seconds(program: str, *arguments: object, compiled: str) -> dict[str, float]:
    """Run a program in a process of its own, which finds again what Inductor compiled into the folder `compiled`.

    Returns:
        `seconds`, the number on the last line that it prints, and `processor_seconds`, what it and the processes that
        it started have used.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": compiled},
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": float(done.stdout.splitlines()[-1]), "processor_seconds": used}
