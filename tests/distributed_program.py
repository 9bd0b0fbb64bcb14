"""One of several processes that torchrun starts, for `test_distributed`: `distributed_program.py FOLDER JOB ...`.

Each writes what it found to FOLDER as `RANK.json`.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tiny_models import llama, random_ids
from transformers import PreTrainedModel

import xkv_fx
from xkv_fx import Policy
from xkv_fx.errors import PromptError
from xkv_fx.hf import capture as capturing
from xkv_fx.planning.team import Arrays, Progress, Team

PROMPTS = [random_ids(1, 60 + 7 * seed, seed) for seed in range(3)]
STATISTICS = ("preference", "similarity")
APPEND = Policy(eviction="append")


capturing.capture = functools.cache(capturing.capture)  # which takes longer than all the rest


@functools.cache
def model() -> PreTrainedModel:
    return llama(1)


def profiled(group: dist.ProcessGroup | None, progress: Progress | None = None) -> str:
    return xkv_fx.profile(model(), PROMPTS, statistics=STATISTICS, group=group, progress=progress).digest()


def calibrated(group: dist.ProcessGroup | None, resume: Path | None = None) -> str:
    measured = xkv_fx.calibrate(
        model(), PROMPTS, grid=(0.25, 0.5), policy=APPEND, continuation=6, resume=resume, group=group
    )
    return measured.digest()


def measuring(folder: Path) -> dict[str, Any]:
    """The digests of what all found together, and alone."""
    seen: list[int] = []
    together = profiled(dist.group.WORLD, lambda done, total: seen.append(done)), calibrated(dist.group.WORLD, folder)
    parts = len(list(folder.glob("*.safetensors")))
    return {"together": together, "alone": (profiled(None), calibrated(None)), "seen": seen, "parts": parts}


def errors(folder: Path) -> dict[str, Any]:
    """What is raised in each process where one of them fails, or was given something else."""
    rank = dist.get_rank()

    def fail(prompt: int) -> Arrays:
        if prompt == 3:
            raise PromptError("not this one")
        return {"prompt": np.array(prompt)}

    (folder / "file").touch()
    attempts = {
        "in a round": lambda: Team(dist.group.WORLD).measure(6, fail),
        "before": lambda: calibrated(dist.group.WORLD, folder / "file" if rank == 1 else None),
        "other prompts": lambda: xkv_fx.profile(model(), PROMPTS[rank:], group=dist.group.WORLD),
        "no group": lambda: xkv_fx.profile(model(), PROMPTS, group=2),  # type: ignore[arg-type]
    }
    return {name: raised(attempt) for name, attempt in attempts.items()}


def raised(attempt: Any) -> list[str]:
    try:
        attempt()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


JOBS = {"measuring": measuring, "errors": errors}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {}
    for job in sys.argv[2:]:
        (folder / job).mkdir(exist_ok=True)
        found[job] = JOBS[job](folder / job)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
