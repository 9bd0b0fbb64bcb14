"""How far plans stray on held-out prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from xkv_fx.budgets import Plan
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BudgetError
from xkv_fx.planning.measure.held_out import HeldOut, HeldOutResult
from xkv_fx.planning.measure.team import Progress


def measure_held_out(
    captured: CapturedModel,
    plans: Sequence[Plan],
    prompts: Sequence[Tensor],
    continuation: int,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> HeldOutResult:
    """Measure every plan on every prompt; one prefill of a prompt serves all plans of a scorer.

    Args:
        captured: a model captured for one row.
        plans: their scorers and evictions may differ.
        prompts: int64 `[1, S + continuation]`, which nothing was measured from before.
        continuation: how many of the last tokens are fed as decode would.
        resume, progress: as `HeldOut` takes them.

    Raises:
        BudgetError: no plans, or no prompts.
        BudgetError, ModelMismatchError, PromptError, UnsupportedModelError: as `xkv_fx.verify`.
    """
    if not plans or not prompts:
        raise BudgetError(f"give plans, and prompts to measure them on; got {len(plans)} and {len(prompts)}")
    return HeldOut(captured, [(ids, continuation) for ids in prompts], resume).measure(plans, progress=progress)
