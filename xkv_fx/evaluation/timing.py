"""Timing a generation from outside, through the streamer that every `generate` takes."""

from __future__ import annotations

import statistics
import time

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


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
