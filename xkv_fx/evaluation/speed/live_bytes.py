"""Live tensor bytes over time, counted from what torch's allocator reports, not from the process's size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity


def memory_changes(run: Callable[[], Any]) -> list[int]:
    """Bytes of every block that CPU tensors took (above 0) or gave back (below) while `run` ran, in order."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return [
        event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()) if event.name() == "[memory]"
    ]


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that were live at once, above what was live before."""
    live = most = 0
    for size in memory_changes(run):
        live += size
        most = max(most, live)
    return most
