"""Calibrating: what it costs, in KL to the full cache, when one layer alone holds less."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BudgetError, PromptError, UnsupportedModelError
from xkv_fx.files import is_int
from xkv_fx.formats import LayerFormats, codes_keys
from xkv_fx.layers import LayerSpec
from xkv_fx.mean_keys import MeanKeys
from xkv_fx.passes.measure.cut_at_attention import CutModel
from xkv_fx.planning.data.by_head import check_by, one_head_means, one_head_specs
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.data.grid import check_grid
from xkv_fx.planning.measure.alone import Alone, all_alone
from xkv_fx.planning.measure.continuation import (
    FULL,
    FullRun,
    cut_model,
    run_full,
    storing_as,
)
from xkv_fx.planning.measure.divergence import kl_divergence
from xkv_fx.planning.measure.mean_keys import gathered, means_of, name_of, sums_of_keys
from xkv_fx.planning.measure.partial_results import PartialResults
from xkv_fx.planning.measure.points import GRID, Points, pairs_to_measure, points_to_measure
from xkv_fx.planning.measure.prompts import check_tokens
from xkv_fx.planning.measure.team import ALONE, Arrays, Progress, Team
from xkv_fx.policy import Policy
from xkv_fx.runtime.scorers import Scorer, check_scores_parts, scorer_of

CALIBRATE_CONTINUATION = 16
# KL of a continuation that was run again under full budgets; more means that tokens meet outside attention too.
_SAME = {torch.float32: 1e-6, torch.float64: 1e-9}


def measure_calibration(
    captured: CapturedModel,
    prompts: Sequence[Tensor],
    policy: Policy,
    grid: Sequence[float] | None = None,
    continuation: int = CALIBRATE_CONTINUATION,
    progress: Progress | None = None,
    resume: str | os.PathLike[str] | None = None,
    team: Team = ALONE,
    formats: Sequence[str | LayerFormats] | None = None,
    means: MeanKeys | None = None,
    by: str = "layer",
) -> Calibration:
    """Measure each layer, or each KV head of each layer, alone at each capacity and in each of the formats, all others
    full, on every prompt.

    Where keys are stored in fewer bits, their means over the tokens of all prompts are measured first, since what is
    left without them is what is stored.

    Args:
        captured: a model captured for one row.
        prompts: token ids, int64 `[1, S + continuation]`; the last ones are the continuation.
        policy: scorer, eviction, recent and sinks that the plan will be served with.
        grid: ascending shares of the S tokens (of the sliding window, where a layer has a smaller one).
        continuation: tokens fed after each prompt.
        progress: called as `progress(done, total)` after each prompt.
        resume: a folder for what was measured so far, a file a prompt; results of the same model, policy, grid,
            prompt and mean keys are read from there instead of measured.
        team: who measures.
        formats: see `pairs_to_measure`; the model's dtype alone when None.
        means: mean keys that were measured before; measured here when None.
        by: `"layer"` or `"head"`.

    Raises:
        PromptError, BudgetError, UnsupportedModelError: see `xkv_fx.calibrate`.
    """
    check_measurable(policy, continuation, grid, by)
    pairs = pairs_to_measure(formats, captured.layers)
    points = points_to_measure(pairs, grid, captured.layers, by)
    alone = all_alone(captured.layers, by)

    def prepare() -> tuple[list[Tensor], Scorer, PartialResults]:
        _check_processes(captured, team, resume is not None, by)
        rows = [check_prompt(index, prompt, captured, continuation) for index, prompt in enumerate(prompts)]
        scorer = captured.scorer_of(policy)
        if by == "head":
            check_scores_parts(scorer)
        shape = (len(alone), len(points))
        settings = _settings(policy, points, continuation, by)
        return rows, scorer, PartialResults(resume, captured, settings, {"kl": (shape, np.dtype(np.float32))})

    rows, scorer, done = team.together(prepare)
    team.check_same(lambda: (done.base, *rows))
    cut: CutModel | None = None

    def model(ids: Tensor) -> CutModel:
        nonlocal cut
        cut = cut_checked(captured, scorer, ids, continuation) if cut is None else cut
        return cut

    if not any(map(codes_keys, pairs)):
        means = None
    elif means is None:
        means = _mean_keys(model, rows, done, team)
    if means is not None:
        done = done.of([mean and mean.digest for mean in means])

    def measure(prompt: int) -> Arrays:
        ids = rows[prompt]

        def found() -> Arrays:
            full = run_full(model(ids), scorer, ids, continuation)
            return {"kl": _measure(full, captured.layers, policy, points, means, alone)}

        return done.results(ids, found)

    kl = np.stack([result["kl"] for result in team.measure(len(rows), measure, progress)])
    lengths = tuple(ids.shape[1] - continuation for ids in rows)
    measured_means = None if means is None else gathered(means, captured.shard, captured.device)
    layers, heads = captured.layers, None
    if by == "head":
        layers, heads = one_head_specs(captured.layers), tuple(spec.kv_heads for spec in captured.layers)
        if measured_means is not None:
            measured_means = one_head_means(measured_means, captured.layers)
    return Calibration(
        kl, points.shares, lengths, continuation, policy, layers, captured.fingerprint, points.formats, measured_means,
        heads,
    )  # fmt: skip


def _check_processes(captured: CapturedModel, team: Team, resumed: bool, by: str) -> None:
    """Refuse what cannot be measured by several processes.

    Raises:
        BudgetError: as said.
    """
    team.check_whole(captured)
    if captured.shard.size == 1:
        return
    if resumed:
        raise BudgetError(
            "what processes measured that share a model cannot be resumed: one might find a result that another lacks; "
            "leave resume out"
        )
    if by == "head":
        raise BudgetError(
            "by='head' is not taken for a model whose heads processes share: each would cut another head at the same "
            "time; calibrate by layer, or the whole model in one process"
        )


def _settings(policy: Policy, points: Points, continuation: int, by: str) -> list[Any]:
    """What else a result depends on; as it was written before there were formats and heads, where there are none."""
    settings: list[Any] = [policy.to_dict(), list(points.shares), int(continuation)]
    settings += [] if points.formats is None else [points.formats]
    return settings + ([by] if by == "head" else [])


def _mean_keys(
    model: Callable[[Tensor], CutModel], rows: Sequence[Tensor], done: PartialResults, team: Team
) -> MeanKeys:
    """The mean keys of the layers over the tokens of all prompts, continuations among them."""
    layers = done.captured.layers
    expected = {
        name_of(layer): ((spec.kv_heads, spec.key_dim), np.dtype(np.float64)) for layer, spec in enumerate(layers)
    }
    sums = PartialResults(done.folder, done.captured, ["sums of keys"], expected)

    def add_up(prompt: int) -> Arrays:
        ids = rows[prompt]
        return sums.results(ids, lambda: sums_of_keys(model(ids), ids))

    found = team.measure(len(rows), add_up)
    return means_of(found, sum(ids.shape[1] for ids in rows), len(layers))


def check_measurable(policy: Policy, continuation: int, grid: Sequence[float] | None = None, by: str = "layer") -> None:
    """Refuse what cannot be measured, before a model is captured for it.

    Raises:
        BudgetError: no policy or one that never evicts, an unknown scorer, a grid or continuation out of range, or a
            `by` that is neither `"layer"` nor `"head"`.
    """
    if not isinstance(policy, Policy):
        raise BudgetError(f"policy must be an xkv_fx.Policy; got {type(policy).__name__}")
    if policy.eviction == "none":
        raise BudgetError("eviction='none' never evicts, so there is nothing to measure; choose what will serve")
    scorer_of(policy)
    if not is_int(continuation) or continuation < 1:
        raise BudgetError(f"continuation must be a whole number of at least 1; got {continuation!r}")
    check_grid(GRID if grid is None else grid)
    check_by(by)


def check_prompt(index: int, ids: Tensor, captured: CapturedModel, continuation: int) -> Tensor:
    """A prompt and its continuation, on the model's device.

    Raises:
        PromptError: fewer than 2 tokens before the continuation, more tokens than positions, or unknown tokens.
    """
    tokens = ids.shape[1]
    if tokens - continuation < 2:
        raise PromptError(
            f"prompt {index} has {tokens} tokens; the last {continuation} are its continuation, which leaves too "
            "few to choose from"
        )
    return check_tokens(index, ids, captured)


def cut_checked(captured: CapturedModel, scorer: Scorer, ids: Tensor, continuation: int) -> CutModel:
    """The model's graph, cut, once it has been shown on a prompt that its layers can be run again by themselves.

    Raises:
        UnsupportedModelError: they cannot; something but attention lets tokens meet.
    """
    model = cut_model(captured, scorer)
    few = min(continuation, 8)
    short = ids[:, : min(ids.shape[1], 64 + few)]
    full = run_full(model, scorer, short, few)
    error = float(full.divergence([(FULL,) * len(captured.layers)] * 2).mean())
    with torch.no_grad():
        positions = torch.arange(short.shape[1], device=short.device)[None]
        uncut = torch.log_softmax(captured.prompt(short, positions)[0, -few:].float(), -1)
    error = max(error, float(kl_divergence(uncut, full.logits).mean()))
    limit = _SAME.get(captured.dtype, 1e-2)
    if not error <= limit:
        raise UnsupportedModelError(
            f"run again with nothing evicted, the continuation of a prompt strays by a KL of {error:.2g} (limit "
            f"{limit:.0e}); in this model tokens meet outside attention too, so its layers cannot be measured alone"
        )
    return model


def _measure(
    full: FullRun,
    layers: Sequence[LayerSpec],
    policy: Policy,
    points: Points,
    means: MeanKeys | None,
    alone: Sequence[Alone],
) -> NDArray[np.float32]:
    """KL of one prompt, float32 `[alone, points]`.

    Args:
        alone: what is measured alone, one after another.
    """
    mean_of = means or (None,) * len(layers)
    plans = []
    for one in alone:
        for share, formats in points:
            storing = storing_as(layers[one.layer], formats, mean_of[one.layer])
            plans.append(one.plans(layers, share, storing, policy, full.prompt_tokens, full.tokens))
    measured = full.divergence(plans).mean(1).numpy()
    kl: NDArray[np.float32] = measured.reshape(len(alone), len(points)).astype(np.float32)
    if not np.isfinite(kl).all():
        raise PromptError("the model's output is not finite; was it run in a dtype that overflows?")
    return kl
