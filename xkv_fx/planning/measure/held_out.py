"""How far plans stray from the full cache on held-out prompts; what was measured is kept, a file for each prompt."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xkv_fx.budgets import Plan
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import FileFormatError, PromptError
from xkv_fx.fields import DOCUMENT, NUMBER, OBJECT, Fields, check_fields
from xkv_fx.files import read_sealed_json, remove_kept, write_sealed_json
from xkv_fx.passes.measure.cut_at_attention import CutModel
from xkv_fx.planning.measure.calibrate import check_measurable, check_prompt, cut_checked
from xkv_fx.planning.measure.continuation import layer_plans, run_full
from xkv_fx.planning.measure.team import Progress
from xkv_fx.planning.measure.weights import digest_of_weights
from xkv_fx.runtime.scorers import Scorer

FORMAT, VERSION = "xkv_fx.held_out_prompt", 1
_FILE: Fields = {**DOCUMENT, "plans": OBJECT}
_PLAN: Fields = {"kl": NUMBER, "agreement": NUMBER}
Kept = dict[str, tuple[float, float]]
"""KL and agreement of one prompt, by the name of each plan."""

Row = tuple[Tensor, int]
"""Token ids, int64 `[1, S + T]`, and T: the last tokens, which are fed as decode would and measured."""


@dataclasses.dataclass(frozen=True)
class HeldOutResult:
    """What plans cost on each prompt, means over its continuation.

    Attributes:
        kl: KL(full || plan), nats, float64 `[prompts, plans]`.
        agreement: the share of tokens for which both prefer the same next one, float64 `[prompts, plans]`.
    """

    kl: NDArray[np.float64]
    agreement: NDArray[np.float64]


def identity_of(plan: Plan) -> dict[str, Any]:
    """All of a plan that decides what it answers: everything but how it was made, as JSON's types."""
    return {name: value for name, value in plan.to_dict().items() if name != "provenance"}


class HeldOut:
    """Prompts that nothing was measured from before.

    Args:
        captured: a model captured for one row.
        rows: the prompts.
        resume: a folder for what was measured so far, a file a prompt; plans that a file lacks are added to it. In
            memory alone when None.

    Raises:
        PromptError: a prompt that is too short for its continuation, too long, or of unknown tokens.
    """

    def __init__(
        self, captured: CapturedModel, rows: Sequence[Row], resume: str | os.PathLike[str] | None = None
    ) -> None:
        self.captured = captured
        self.rows = [(check_prompt(index, ids, captured, tokens), tokens) for index, (ids, tokens) in enumerate(rows)]
        self._files = _Files(resume, captured)
        self._kept: dict[int, Kept] = {}
        self._cut: dict[Scorer, CutModel] = {}

    def measure(
        self,
        plans: Sequence[Plan],
        prompts: int | None = None,
        more: Callable[[], bool] | None = None,
        progress: Progress | None = None,
    ) -> HeldOutResult:
        """How far each plan strays on each prompt. One prefill of a prompt serves all plans of a scorer.

        Args:
            plans: at least one.
            prompts: only so many of the first prompts; all when None.
            more: asked before each prompt but the first whether to go on.
            progress: called as `progress(done, total)` after each prompt.

        Raises:
            BudgetError, ModelMismatchError, PromptError, UnsupportedModelError: as `xkv_fx.verify`.
        """
        rows = self.rows[:prompts]
        for plan in plans:
            check_measurable(plan.policy, min(tokens for _, tokens in rows))
            plan.check_layers(self.captured.layers, self.captured.fingerprint)
        named = [(_name_of(plan), plan) for plan in plans]
        values: list[list[tuple[float, float]]] = []
        for index in range(len(rows)):
            if index and more is not None and not more():
                break
            kept = self._of_prompt(index, dict(named))
            values.append([kept[name] for name, _ in named])
            if progress is not None:
                progress(index + 1, len(rows))
        found = np.array(values)
        return HeldOutResult(found[..., 0], found[..., 1])

    def _of_prompt(self, index: int, plans: dict[str, Plan]) -> Kept:
        ids, tokens = self.rows[index]
        kept = self._kept.setdefault(index, self._files.read(ids, tokens))
        missing: dict[Scorer, dict[str, Plan]] = {}
        for name, plan in plans.items():
            if name not in kept:
                missing.setdefault(self.captured.scorer_of(plan.policy), {})[name] = plan
        for scorer, of_scorer in missing.items():
            kept |= self._measured(index, scorer, of_scorer)
        if missing:
            self._files.write(ids, tokens, kept)
        return kept

    def _measured(self, index: int, scorer: Scorer, plans: dict[str, Plan]) -> Kept:
        ids, tokens = self.rows[index]
        if scorer not in self._cut:
            self._cut[scorer] = cut_checked(self.captured, scorer, ids, tokens)
        full = run_full(self._cut[scorer], scorer, ids, tokens)
        layers, shard = self.captured.layers, self.captured.shard
        strayed = full.compare([layer_plans(plan, layers, tokens, shard) for plan in plans.values()])
        kl, agreement = strayed.kl.mean(1).numpy(), strayed.agree.double().mean(1).numpy()
        if not np.isfinite(kl).all():
            raise PromptError(f"the model's output on prompt {index} is not finite; does its dtype overflow?")
        return {name: (float(kl[at]), float(agreement[at])) for at, name in enumerate(plans)}


def remove_held_out(folder: Path) -> None:
    """Delete what was kept in a `resume` folder, and the folder unless something else is in it."""
    remove_kept(folder, ".json")


def _name_of(plan: Plan) -> str:
    return hashlib.sha256(json.dumps(identity_of(plan), sort_keys=True).encode()).hexdigest()


class _Files:
    """What was measured of each prompt, named by a hash of all that it depends on but the plans."""

    def __init__(self, folder: str | os.PathLike[str] | None, captured: CapturedModel) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.base = [captured.fingerprint, str(captured.dtype), digest_of_weights(captured)]

    def _path(self, folder: Path, ids: Tensor, tokens: int) -> Path:
        digest = hashlib.sha256(json.dumps([*self.base, tokens]).encode() + ids.cpu().numpy().astype("<i8").tobytes())
        return folder / f"{digest.hexdigest()}.json"

    def read(self, ids: Tensor, tokens: int) -> Kept:
        """By the name of each plan; what is not sound is left out, and so measured again."""
        if self.folder is None or not (path := self._path(self.folder, ids, tokens)).is_file():
            return {}
        try:
            plans = check_fields(read_sealed_json(path, FORMAT, VERSION), _FILE)["plans"]
            checked = {name: check_fields(values, _PLAN, "a plan") for name, values in plans.items()}
        except FileFormatError:
            return {}
        return {name: (float(values["kl"]), float(values["agreement"])) for name, values in checked.items()}

    def write(self, ids: Tensor, tokens: int, kept: Kept) -> None:
        if self.folder is not None:
            plans = {name: {"kl": kl, "agreement": agreement} for name, (kl, agreement) in kept.items()}
            path = self._path(self.folder, ids, tokens)
            write_sealed_json(path, {"format": FORMAT, "version": VERSION, "plans": plans})
