"""What `xkv-fx eval` does: files and names in, plans, an evaluation and its files out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xkv_fx.errors import BudgetError
from xkv_fx.evaluation.pictures import draw_evaluation
from xkv_fx.evaluation.quality.candidates import (
    JOINT,
    UNIFORM,
    Candidate,
    candidates_of_bytes,
    candidates_of_fractions,
    candidates_of_plans,
    formats_of,
    label_of,
    own_name,
)
from xkv_fx.evaluation.quality.evaluate import EvaluationSettings, evaluate
from xkv_fx.evaluation.quality.kvpress import Kvpress
from xkv_fx.evaluation.quality.quantized import QUANTIZED, planned_bytes, quantized
from xkv_fx.evaluation.quality.results import CONTINUATION_TASK, Evaluation, smallest_sizes
from xkv_fx.evaluation.quality.smallest import smallest_shares
from xkv_fx.evaluation.tasks import NEEDLES, check_task
from xkv_fx.evaluation.texts import cut_prompts, source_code
from xkv_fx.files import write_json
from xkv_fx.formats import LayerFormats
from xkv_fx.hf.capture import layers_of_model
from xkv_fx.layers import LayerSpec, with_itemsize
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.data.profile_data import Profile
from xkv_fx.planning.measure.team import Progress
from xkv_fx.planning.measure.verify import VERIFY_CONTINUATION
from xkv_fx.public_budgets import Budgets


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        plans: budgets files.
        measured: profiles and calibrations, which plans are solved from.
        allocators: their names, or None for each file's own.
        fractions: shares of the full cache.
        scorers: further ones, with uniform plans.
        quantized: names of transformers' quantized caches, which must be installed; None for those that are.
        settings: of the tasks.
        formats: that all layers store in, one plan for each; None for those that `measured` has.
        dtype: that bytes are counted in.
        backend: as in `xkv_fx.transform`.
        kvpress: where it is installed, if it is to be compared with.
    """

    plans: tuple[Path, ...]
    measured: tuple[Profile | Calibration, ...]
    allocators: tuple[str, ...] | None
    fractions: tuple[float, ...]
    scorers: tuple[str, ...]
    quantized: tuple[str, ...] | None
    settings: EvaluationSettings
    formats: tuple[LayerFormats, ...] | None
    dtype: torch.dtype
    backend: str = "eager"
    kvpress: Kvpress | None = None


def run(
    model: Any, tokenizer: Any, request: Request, resume: Path | None = None, progress: Progress | None = None
) -> Evaluation:
    """Everything that `Request` says; see `evaluate` for what may be wrong with it."""
    settings = request.settings
    for task in settings.tasks:
        if task != CONTINUATION_TASK:
            check_task(task)
    if not request.fractions and not request.plans:
        raise BudgetError("there is nothing to compare: give fractions of the full cache, or budgets files")
    plans = {path.stem: Budgets.load(path) for path in request.plans}
    if len(plans) < len(request.plans):
        raise BudgetError("two budgets files have one name; rename one of them, since plans are named by their files")
    asked = tuple(QUANTIZED) if request.quantized is None else request.quantized
    missing = {name: f"pip install {QUANTIZED[name].package}" for name in asked if not quantized(name).installed}
    if request.quantized is not None:
        for name in missing:
            quantized(name).new_cache(model.config)  # says that it is not installed
    there = tuple(name for name in asked if name not in missing)

    layers = layers_of_model(model)
    formats = formats_of(request.measured) if request.formats is None else request.formats
    common = (request.measured, request.allocators, request.scorers, formats, request.dtype)
    candidates = list(candidates_of_fractions(layers, settings.length, request.fractions, *common))
    sizes = {f"{name} bytes": planned_bytes(name, model, layers, settings.length, 1, request.dtype) for name in there}
    if request.fractions:
        candidates += candidates_of_bytes(layers, settings.length, sizes, *common)
    candidates += _given(with_itemsize(layers, request.dtype.itemsize), plans, candidates)
    found = evaluate(
        model,
        tokenizer,
        candidates,
        settings,
        there,
        request.backend,
        dtype=request.dtype,
        resume=resume,
        progress=progress,
        kvpress=request.kvpress,
    )
    return dataclasses.replace(found, not_installed=missing)


def _given(
    layers: Sequence[LayerSpec], plans: dict[str, Budgets], others: Sequence[Candidate]
) -> tuple[Candidate, ...]:
    """Plans from files join the group of their bytes; without fractions they are a group of their own.

    Raises:
        BudgetError: a plan whose bytes are those of no group.
    """
    if not others or not plans:
        return candidates_of_plans(layers, plans)
    sizes = {candidate.budgets.kv_bytes(layers): candidate.size for candidate in others}
    found: list[Candidate] = []
    for name, budgets in plans.items():
        taken = budgets.kv_bytes(layers)
        if taken not in sizes:
            listed = ", ".join(f"{size} {kv_bytes:,}" for kv_bytes, size in sizes.items())
            raise BudgetError(
                f"plans are compared at equal bytes, but {name} takes {taken:,}, which is none of {listed}"
            )
        known = {(other.name, other.size, other.policy) for other in (*others, *found)}
        found += [
            new
            for new in candidates_of_plans(layers, {name: budgets}, sizes[taken])
            if (new.name, new.size, new.policy) not in known
        ]
    return tuple(found)


def smallest(
    model: Any,
    tokenizer: Any,
    request: Request,
    evaluation: Evaluation,
    kl: float = 0.02,
    prompts: int = 12,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The smallest sizes that are enough: by needles, from the evaluation's grid of fractions, and by held-out KL, over
    stretches of source code.

    Returns:
        plain data: `needles` by form and plan, `kl` by plan, None where nothing is small enough.
    """
    ways: dict[str, tuple[Profile | Calibration, str | None]] = {}
    for source in request.measured:
        if own_name(source) != JOINT:
            ways.setdefault(UNIFORM, (source, UNIFORM))
        ways[own_name(source)] = (source, None)
    by_kl: dict[str, float | None] = {}
    if ways:
        stretches = cut_prompts(tokenizer, source_code(), prompts, request.settings.length + VERIFY_CONTINUATION)
        by_kl = smallest_shares(
            model, ways, stretches, kl, request.settings.length, progress=progress, dtype=request.dtype
        )
    return {
        "needles_within_a_point": smallest_sizes(evaluation, NEEDLES),
        "kl_bound": kl,
        "kl_prompts": prompts,
        "kl": {name: None if share is None else label_of(share) for name, share in by_kl.items()},
    }


def write(evaluation: Evaluation, out: Path, extra: dict[str, Any]) -> None:
    """Write the result as JSON, and its tables beside it as Markdown."""
    write_json(out, {**evaluation.to_dict(), **extra})
    out.with_suffix(".md").write_text(evaluation.as_markdown() + "\n", encoding="utf-8")


def draw(evaluation: Evaluation, request: Request, folder: Path) -> None:
    """Write the pictures of an evaluation, with the retention curves of the profiles that it used."""
    draw_evaluation(evaluation, folder, [source for source in request.measured if isinstance(source, Profile)])
