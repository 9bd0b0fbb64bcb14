"""What a figure was measured on, and how fast that reads memory."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

BYTES_READ = 256 * 1024 * 1024
"""More than a processor's caches can hold."""


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor or GPU, threads and versions; nothing that names the machine itself."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


class MemoryReader:
    """Reads one buffer from end to end; the lower bound of a decode step is computed from how long that takes."""

    def __init__(self, device: torch.device) -> None:
        self._buffer: Tensor = torch.ones(BYTES_READ // 8, dtype=torch.int64, device=device)
        self._device = device

    def seconds(self) -> float:
        """How long one reading took."""
        return seconds(self._buffer.sum, self._device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long something took, including all that it started on the device."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait for what was started; on a CPU nothing is left to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_bytes(device: torch.device) -> int | None:
    """Memory that is still available; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
