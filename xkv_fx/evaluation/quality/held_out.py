"""How far plans stray from the full cache on held-out prompts; what was measured is kept, a file for each prompt."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xkv_fx.budgets import Plan
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BudgetError, FileFormatError, PromptError
from xkv_fx.evaluation.quality.candidates import identity_of
from xkv_fx.fields import DOCUMENT, NUMBER, OBJECT, Fields, check_fields
from xkv_fx.files import read_sealed_json, write_sealed_json
from xkv_fx.passes.measure.cut_at_attention import CutModel
from xkv_fx.planning.measure.calibrate import check_measurable, check_prompt, cut_checked
from xkv_fx.planning.measure.continuation import layer_plans, run_full
from xkv_fx.planning.measure.team import Progress
from xkv_fx.planning.measure.weights import digest_of_weights

FORMAT, VERSION = "xkv_fx.held_out_prompt", 1
_FILE: Fields = {**DOCUMENT, "plans": OBJECT}
_PLAN: Fields = {"kl": NUMBER, "agreement": NUMBER}
Kept = dict[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What plans cost on each prompt, means over its continuation.

    Attributes:
        kl: KL(full || plan), nats, float64 `[prompts, plans]`.
        agreement: the share of tokens for which both prefer the same next one, float64 `[prompts, plans]`.
    """

    kl: NDArray[np.float64]
    agreement: NDArray[np.float64]


def measure_held_out(
    captured: CapturedModel,
    plans: Sequence[Plan],
    prompts: Sequence[Tensor],
    continuation: int,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> HeldOut:
    """Measure every plan on every prompt; one prefill of a prompt serves all plans.

    Args:
        captured: a model captured for one row.
        plans: that rank tokens by one scorer; their evictions may differ.
        prompts: int64 `[1, S + continuation]`, which nothing was measured from before.
        continuation: how many of the last tokens are fed as decode would.
        resume: a folder for what was measured so far, a file a prompt; plans that a file lacks are added to it.
        progress: called as `progress(done, total)` after each prompt.

    Raises:
        BudgetError: no plans, or plans of several scorers.
        PromptError: no prompts, or one whose output is not finite.
        BudgetError, ModelMismatchError, PromptError, UnsupportedModelError: as `xkv_fx.verify`.
    """
    scorers = {captured.scorer_of(plan.policy) for plan in plans}
    if len(scorers) != 1 or not prompts:
        raise BudgetError(
            f"what is measured together must be plans of one scorer, and some prompts; got {len(plans)} plans of "
            f"{len(scorers)} scorers, and {len(prompts)} prompts"
        )
    for plan in plans:
        check_measurable(plan.policy, continuation)
        plan.check_layers(captured.layers, captured.fingerprint)
    rows = [check_prompt(index, ids, captured, continuation) for index, ids in enumerate(prompts)]
    names = [hashlib.sha256(json.dumps(identity_of(plan), sort_keys=True).encode()).hexdigest() for plan in plans]
    held = {name: layer_plans(plan, captured.layers, continuation) for name, plan in zip(names, plans, strict=True)}
    files = _Files(resume, captured, continuation)
    (scorer,) = scorers
    model: CutModel | None = None
    results: list[Kept] = []
    for done, ids in enumerate(rows):
        kept = files.read(ids)
        missing = [name for name in held if name not in kept]
        if missing:
            model = cut_checked(captured, scorer, rows[0], continuation) if model is None else model
            strayed = run_full(model, scorer, ids, continuation).compare([held[name] for name in missing])
            kl, agreement = strayed.kl.mean(1).numpy(), strayed.agree.double().mean(1).numpy()
            if not np.isfinite(kl).all():
                raise PromptError(f"the model's output on prompt {done} is not finite; does its dtype overflow?")
            kept |= {name: (float(kl[at]), float(agreement[at])) for at, name in enumerate(missing)}
            files.write(ids, kept)
        results.append(kept)
        if progress is not None:
            progress(done + 1, len(rows))
    values = np.array([[kept[name] for name in names] for kept in results])
    return HeldOut(values[..., 0], values[..., 1])


class _Files:
    """What was measured of each prompt, named by a hash of all that it depends on but the plans."""

    def __init__(self, folder: str | os.PathLike[str] | None, captured: CapturedModel, continuation: int) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            base = [captured.fingerprint, str(captured.dtype), digest_of_weights(captured), continuation]
            self.base = json.dumps(base).encode()

    def _path(self, folder: Path, ids: Tensor) -> Path:
        return folder / f"{hashlib.sha256(self.base + ids.cpu().numpy().astype('<i8').tobytes()).hexdigest()}.json"

    def read(self, ids: Tensor) -> Kept:
        """By the hash of each plan; what is not sound is left out, and so measured again."""
        if self.folder is None or not (path := self._path(self.folder, ids)).is_file():
            return {}
        try:
            plans = check_fields(read_sealed_json(path, FORMAT, VERSION), _FILE)["plans"]
            checked = {name: check_fields(values, _PLAN, "a plan") for name, values in plans.items()}
        except FileFormatError:
            return {}
        return {name: (float(values["kl"]), float(values["agreement"])) for name, values in checked.items()}

    def write(self, ids: Tensor, kept: Kept) -> None:
        if self.folder is not None:
            plans = {name: {"kl": kl, "agreement": agreement} for name, (kl, agreement) in kept.items()}
            write_sealed_json(self._path(self.folder, ids), {"format": FORMAT, "version": VERSION, "plans": plans})
