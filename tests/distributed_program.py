"""What each of several processes does for `test_distributed`: `distributed_program.py FOLDER JOB ...`, under torchrun.

FOLDER holds models of tiny_models by their names. Each process writes what it found to FOLDER as `RANK.json`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import unittest.mock
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tiny_models import random_ids
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import PromptError
from xkv_fx.hf import capture as capturing
from xkv_fx.hf.generation import BudgetedLM
from xkv_fx.planning.measure.team import Arrays, Progress, Team

PROMPTS = [random_ids(1, 60 + 7 * seed, seed) for seed in range(3)]
STATISTICS = ("preference", "similarity")
APPEND = Policy(eviction="append")
capture = functools.cache(capturing.capture)


def once(source: Any, rows: int = 1, check: bool = True, decode: bool = True) -> CapturedModel:
    """What takes longer than all the rest."""
    return capture(source, check=source.tp_size is not None)


def plans(layers: int) -> dict[str, Budgets]:
    capacities = (24, 16)[:layers]
    scored = Budgets(capacities, Policy("h2o", eviction="scored"))
    return {"full": Budgets.full(layers, 60), "half": Budgets(capacities), "scored": scored}


@functools.cache
def model(path: Path, split: bool) -> PreTrainedModel:
    """A whole model, or this process's part of it."""
    options = {"distributed_config": DistributedConfig(tp_plan="auto")} if split else {}
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
    return loaded


def profiled(whole: PreTrainedModel, group: dist.ProcessGroup | None, progress: Progress | None = None) -> str:
    return xkv_fx.profile(whole, PROMPTS, statistics=STATISTICS, group=group, progress=progress).digest()


def calibrated(whole: PreTrainedModel, group: dist.ProcessGroup | None, resume: Path | None = None) -> str:
    measured = xkv_fx.calibrate(
        whole, PROMPTS, grid=(0.25, 0.5), policy=APPEND, continuation=6, resume=resume, group=group
    )
    return measured.digest()


def measuring(folder: Path) -> dict[str, Any]:
    """The digests of what all found together, and alone."""
    whole, world = model(folder / "llama", False), dist.group.WORLD
    seen: list[int] = []
    together = (
        profiled(whole, world, lambda done, total: seen.append(done)),
        calibrated(whole, world, folder / "parts"),
    )
    parts = len(list((folder / "parts").glob("*.safetensors")))
    return {
        "together": together,
        "alone": (profiled(whole, None), calibrated(whole, None)),
        "seen": seen,
        "parts": parts,
    }


def errors(folder: Path) -> dict[str, Any]:
    """What is raised in each process where one of them fails, or was given something else."""
    whole, world, rank = model(folder / "llama", False), dist.group.WORLD, dist.get_rank()

    def fail(prompt: int) -> Arrays:
        if prompt == 3:
            raise PromptError("not this one")
        return {"prompt": np.array(prompt)}

    (folder / "file").touch()
    attempts = {
        "in a round": lambda: Team(world).measure(6, fail),
        "before": lambda: calibrated(whole, world, folder / "file" if rank == 1 else None),
        "other prompts": lambda: xkv_fx.profile(whole, PROMPTS[rank:], group=world),
        "no group": lambda: xkv_fx.profile(whole, PROMPTS, group=2),  # type: ignore[arg-type]
    }
    return {name: raised(attempt) for name, attempt in attempts.items()}


def split(folder: Path, name: str = "llama", backend: str = "eager", names: Sequence[str] = ("full", "half")) -> Any:
    """A model whose heads the processes share, beside the whole one: what each plan generates and keeps."""
    parts, whole = (model(folder / name, split) for split in (True, False))
    planned = plans(whole.config.num_hidden_layers)
    ids = random_ids(1, 40)
    with torch.no_grad():
        before = parts(ids).logits
    part, reference = (xkv_fx.transform(source, planned[names[0]], backend=backend) for source in (parts, whole))
    found = {names[0]: compared(part, reference, ids)}
    for plan in names[1:]:
        found[plan] = compared(part.with_budgets(planned[plan]), reference.with_budgets(planned[plan]), ids)
    for plan in names:
        found[plan]["planned"] = planned[plan].kv_bytes(parts)
    with torch.no_grad():
        found["untouched"] = torch.equal(parts(ids).logits, before)
    return found


def compared(part: BudgetedLM, reference: BudgetedLM, ids: torch.Tensor) -> dict[str, Any]:
    sessions = part.new_session(), reference.new_session()
    options: dict[str, Any] = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}
    generated: list[Any] = [
        llm.generate(ids, past_key_values=session, **options)
        for llm, session in zip((part, reference), sessions, strict=True)
    ]
    logits = [torch.stack(found.logits) for found in generated]
    heads = part.layers[0].kv_heads
    first = dist.get_rank() * heads % reference.layers[0].kv_heads
    own = slice(first, first + heads)
    kept = [
        torch.equal(sessions[0].kept_positions(layer), sessions[1].kept_positions(layer)[:, own])
        for layer in range(len(part.layers))
    ]
    return {
        "tokens": [found.sequences.tolist() for found in generated],
        "error": float((logits[0] - logits[1]).abs().max()),
        "kept": all(kept),
        "bytes": [part.kv_bytes, sessions[0].kv_bytes, reference.kv_bytes],
    }


def served_in_fewer_bits(parts: PreTrainedModel, whole: PreTrainedModel, mean_keys: Any) -> list[list[int]]:
    """Tokens of the model in parts and of the whole one, each process taking the mean keys of its own heads."""
    plan = Budgets((24, 16), Policy(), formats=(("int8", "int8"),) * 2, mean_keys=mean_keys)
    llms = (xkv_fx.transform(source, plan, backend="eager") for source in (parts, whole))
    return [llm.generate(PROMPTS[0], max_new_tokens=6, do_sample=False)[0].tolist() for llm in llms]


def split_planning(folder: Path) -> dict[str, Any]:
    """What is measured of a model whose heads the processes share, and what is refused of it."""
    parts, whole = (model(folder / "llama", split) for split in (True, False))
    curves = [xkv_fx.profile(source, PROMPTS[:1]).curves[0] for source in (parts, whole)]
    measured = [
        xkv_fx.calibrate(source, PROMPTS[:1], grid=(0.25, 0.5), continuation=6, formats=("model", "int8"))
        for source in (parts, whole)
    ]
    kl = [calibration.kl for calibration in measured]
    means = [[mean.values for mean in calibration.mean_keys or () if mean is not None] for calibration in measured]
    half = plans(2)["half"]
    llm = xkv_fx.transform(parts, half, backend="eager")
    session = llm.new_session()
    llm(PROMPTS[0], past_key_values=session)
    session.save(folder / f"{dist.get_rank()}.safetensors")
    dist.barrier()
    attempts = {
        "scorer": lambda: llm.with_budgets(Budgets((24, 16), Policy("tova"))),
        "measured scorer": lambda: xkv_fx.profile(parts, PROMPTS, policy=Policy("tova")),
        "engine": lambda: xkv_fx.export(llm, folder / "engine"),
        "torch.compile": lambda: xkv_fx.Cache(parts, half),
        "group": lambda: xkv_fx.profile(parts, PROMPTS, group=dist.group.WORLD),
        "resume": lambda: xkv_fx.calibrate(parts, PROMPTS, resume=folder / "parts"),
        "statistics": lambda: xkv_fx.profile(parts, PROMPTS, statistics=STATISTICS),
        "other's session": lambda: llm.new_session().load(folder / f"{1 - dist.get_rank()}.safetensors"),
    }
    return {
        "curves": float(abs(curves[0] - curves[1]).max()),
        "kl": float(abs(kl[0] - kl[1]).max()),
        "means": [float(abs(ours - theirs).max()) for ours, theirs in zip(*means, strict=True)],
        "stored": served_in_fewer_bits(parts, whole, measured[1].mean_keys),
        "part": "part " in llm.describe(),
        "refused": {name: raised(attempt) for name, attempt in attempts.items()},
    }


def families(folder: Path) -> dict[str, Any]:
    """Models whose layers are split in other ways, and two that are not taken."""
    every = tuple(plans(2))
    found = {
        "tied": split(folder, "tied", names=every),
        "gemma2": split(folder, "gemma2", names=every),
        "qwen3": split(folder, "qwen3"),
        "mistral": split(folder, "mistral"),
        "phi3": split(folder, "phi3"),
        "inductor": split(folder, "llama", "inductor"),
    }
    others = {name: model(folder / name, True) for name in ("mixtral", "odd")}
    refused = {name: raised(partial(xkv_fx.transform, other, plans(1)["full"])) for name, other in others.items()}
    return {"split": found, "refused": refused}


def raised(attempt: Any) -> list[str]:
    try:
        attempt()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


JOBS = {
    "measuring": measuring, "errors": errors, "split": split, "split_planning": split_planning, "families": families
}  # fmt: skip


def run_docs(folder: Path) -> None:
    """The blocks that docs have for programs of several processes, which are no ```python."""
    ids = random_ids(1, 40)
    given: dict[str, Any] = {
        "xkv_fx": xkv_fx,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "folder": folder / "llama",
        "model": AutoModelForCausalLM.from_pretrained(folder / "llama"),
        "prompts": [random_ids(1, 60, seed) for seed in range(2)],
        "budgets": plans(2)["half"],
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }
    os.chdir(folder)
    for page in ("planning", "how-it-works"):
        path = Path(__file__).parents[1] / "docs" / f"{page}.md"
        for block in re.findall(r"^```py\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            exec(compile(block, str(path), "exec"), given)


def run(folder: Path, jobs: Sequence[str]) -> dict[str, Any]:
    """Take part in these jobs, as the process that the environment says."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    try:
        with unittest.mock.patch.object(capturing, "capture", once):
            return {job: JOBS[job](folder) for job in jobs}
    finally:
        dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    folder, jobs = Path(sys.argv[1]), sys.argv[2:]
    if jobs == ["docs"]:
        return run_docs(folder)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(run(folder, jobs)))


if __name__ == "__main__":
    main()
