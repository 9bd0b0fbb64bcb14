"""What compared plans are solved from: profiles and calibrations, given as files or measured here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress as Bars
from torch import Tensor

from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BudgetError
from xkv_fx.evaluation.quality.candidates import CALIBRATED, JOINT, UNIFORM
from xkv_fx.evaluation.texts import KINDS, cut_prompts
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.data.profile_data import Profile
from xkv_fx.planning.measure.calibrate import CALIBRATE_CONTINUATION, measure_calibration
from xkv_fx.planning.measure.profile import measure_profile
from xkv_fx.planning.measure.team import Progress
from xkv_fx.policy import Policy

CALIBRATED_ON = "documentation"
STATISTICS = ("preference", "similarity")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What plans are solved by.

    Attributes:
        allocators: names; `"joint"` needs a calibration of formats, `"calibrated"` one without, others a profile.
        formats: that a calibration for `"joint"` measures.
        context: tokens of a prompt.
        given: what was measured before; the rest is measured.
        out: a folder for what is measured, and for its parts, so that an interrupted run goes on.
        by: what gets a capacity of its own, `"layer"` or `"head"`, or both, beside one another.
    """

    allocators: tuple[str, ...]
    formats: tuple[str, ...]
    context: int
    given: tuple[Profile | Calibration, ...]
    out: Path
    by: tuple[str, ...] = ("layer",)


def split_prompts(
    tokenizer: Any, calibrate_on: int, held_out: int, tokens: int
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Stretches to calibrate on, spread evenly among the held-out ones of their kind; and the held-out ones."""
    stretches = {
        kind: list(cut_prompts(tokenizer, text(), held_out + (calibrate_on if kind == CALIBRATED_ON else 0), tokens))
        for kind, text in KINDS.items()
    }
    own = stretches[CALIBRATED_ON]
    chosen = {round(place) for place in np.linspace(0, len(own) - 1, calibrate_on)}
    calibration = [ids for place, ids in enumerate(own) if place in chosen]
    stretches[CALIBRATED_ON] = [ids for place, ids in enumerate(own) if place not in chosen]
    return calibration, stretches


def reporter(bars: Bars, what: str) -> Progress:
    """A progress callback that moves a bar of its own."""
    task = bars.add_task(what, total=None)
    return lambda done, total: bars.update(task, completed=done, total=total)


def sources_for(
    captured: CapturedModel, eviction: str, prompts: Sequence[Tensor], wanted: Wanted, bars: Bars
) -> tuple[tuple[Profile | Calibration, ...], dict[str, float]]:
    """What the wanted allocators read, under one eviction; and how many seconds each measurement took.

    Args:
        captured: a model captured for one row.
        prompts: int64 `[1, S]` of at least `wanted.context` and the calibration's continuation.

    A profile may be of another scorer than the calibrations beside it; what is measured here is measured for theirs.

    Raises:
        BudgetError: what was given under this eviction is of several policies otherwise; or as `xkv_fx.calibrate`.
    """
    found = [source for source in wanted.given if source.policy.eviction == eviction]
    found.sort(key=lambda source: isinstance(source, Profile))  # so that uniform plans begin with the calibrations' one
    policies = {source.policy for source in found if isinstance(source, Calibration)}
    policies = policies or {source.policy for source in found} or {Policy(eviction=eviction)}  # type: ignore[arg-type]
    if len(policies) != 1:
        raise BudgetError(f"what was measured under eviction={eviction!r} is of {len(policies)} policies; give one")
    (policy,) = policies
    seconds: dict[str, float] = {}

    def measured(name: str, measure: Callable[[Progress], Profile | Calibration]) -> None:
        started = time.perf_counter()
        source = measure(reporter(bars, f"{eviction}: {name}"))
        seconds[name] = time.perf_counter() - started
        source.save(wanted.out / f"{name}-{eviction}.safetensors")
        found.append(source)

    def calibrated(by: str, formats: tuple[str, ...] | None) -> Callable[[Progress], Calibration]:
        return lambda progress: measure_calibration(
            captured,
            [ids[:, : wanted.context + CALIBRATE_CONTINUATION] for ids in prompts],
            policy,
            progress=progress,
            resume=wanted.out / "calibrated",
            formats=formats,
            by=by,
        )

    has_profile = any(isinstance(source, Profile) for source in found)
    if not has_profile and set(wanted.allocators) - {UNIFORM, CALIBRATED, JOINT}:
        whole = [ids[:, : wanted.context] for ids in prompts]
        measured("profile", lambda progress: measure_profile(captured, whole, policy, progress, STATISTICS))
    for by in wanted.by:
        added = "" if by == "layer" else "-by-head"
        calibrations = (source for source in found if isinstance(source, Calibration))
        given = [source for source in calibrations if (source.heads is None) == (by == "layer")]
        if CALIBRATED in wanted.allocators and all(source.formats is not None for source in given):
            measured(f"calibration{added}", calibrated(by, None))
        if JOINT in wanted.allocators and all(source.formats is None for source in given):
            measured(f"calibration-formats{added}", calibrated(by, wanted.formats))
    return tuple(found), seconds
