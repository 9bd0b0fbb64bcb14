"""Profiling: how much of the attention mass each layer would keep at every capacity, measured on sampled prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BudgetError, PromptError
from xkv_fx.passes.pipeline import profile_pipeline, run_pipeline
from xkv_fx.planning.data.by_head import check_by, one_head_specs
from xkv_fx.planning.data.curves import retention_curve
from xkv_fx.planning.data.profile_data import MASS, Profile
from xkv_fx.planning.measure.continuation import cut_model
from xkv_fx.planning.measure.prompts import check_tokens
from xkv_fx.planning.measure.second_reading import scores_of_second_reading
from xkv_fx.planning.measure.team import ALONE, Arrays, Progress, Team
from xkv_fx.planning.measure.weights import digest_of_weights
from xkv_fx.policy import Policy
from xkv_fx.runtime.scorers import Scorer, check_measures_attention, check_scores_parts, reading_of, scorer_of
from xkv_fx.sizes import check_share, share_of

Measure = Callable[[Tensor], tuple[Tensor, ...]]


def sample_prompts(prompts: Sequence[Tensor], sampling: float | str) -> tuple[Tensor, ...]:
    """The first `sampling` share of the prompts, at least one (XKV, arXiv 2412.05896, samples 0.1 or 0.2).

    Raises:
        PromptError: there are no prompts.
        BudgetError: `sampling` is no share above 0 and at most 1.
    """
    if not prompts:
        raise PromptError("there are no prompts to profile; give at least one")
    share = share_of(sampling, "sampling")
    check_share(share, "sampling")
    return tuple(prompts[: math.ceil(share * len(prompts) - 1e-9)])


def check_profilable(policy: Policy, by: str = "layer") -> None:
    """Refuse what cannot be profiled, before a model is captured for it.

    Raises:
        BudgetError: not a policy, an unknown scorer, or one whose scores are not attention mass; or a `by` that is
            neither `"layer"` nor `"head"`.
    """
    if not isinstance(policy, Policy):
        raise BudgetError(f"policy must be an xkv_fx.Policy; got {type(policy).__name__}")
    scorer = scorer_of(policy)
    check_measures_attention(policy.scorer, scorer, "a share of them would be no retention")
    check_by(by)


def measure_profile(
    captured: CapturedModel,
    prompts: Sequence[Tensor],
    policy: Policy,
    progress: Progress | None = None,
    statistics: Sequence[str] = (),
    team: Team = ALONE,
    by: str = "layer",
) -> Profile:
    """Run the score graph on each prompt and turn the scores into retention curves.

    Args:
        captured: a model captured for one row.
        prompts: token ids, int64 `[1, S]`.
        policy: scorer, recent and sinks that the plan will be served with.
        progress: called as `progress(done, total)` after each prompt.
        statistics: what else to measure of each layer; see `AddStatistics`.
        team: who measures.
        by: `"layer"`, or `"head"` for a curve of each KV head.

    Raises:
        BudgetError: see `check_profilable`; or an unknown statistic; or processes that were not given the same.
        PromptError: a prompt too short to rank, longer than the model has positions for, or with a token that the
            model does not have.
    """

    def prepare() -> tuple[list[Tensor], Measure]:
        team.check_whole(captured)
        check_profilable(policy, by)
        scorer = captured.scorer_of(policy)
        if statistics and captured.shard.size > 1:
            raise BudgetError("statistics are of all heads, and each process of this model has some; leave them out")
        if by == "head":
            _check_by_head(captured, scorer, statistics)
        rows = [_check_prompt(index, prompt, captured) for index, prompt in enumerate(prompts)]
        return rows, _measuring(captured, scorer, tuple(statistics))

    rows, run = team.together(prepare)
    described = [captured.fingerprint, str(captured.dtype), policy.to_dict(), list(statistics), by]
    team.check_same(lambda: (json.dumps(described), digest_of_weights(captured), *rows))
    layers = len(captured.layers)

    def measure(prompt: int) -> Arrays:
        ids = rows[prompt]
        measured = run(ids)
        scores = [captured.shard.all_heads(layer)[0].cpu().numpy() for layer in measured[:layers]]
        if by == "head":
            scores = [head for layer in scores for head in np.split(layer, len(layer))]
        curves = [retention_curve(layer, policy) for layer in scores]
        more = torch.cat(measured[layers:]).view(len(statistics), layers) if statistics else torch.empty(0, layers)
        mass = np.array([of_one.sum(dtype=np.float64) for of_one in scores])
        return {
            "curves": np.stack(curves).astype(np.float32),
            "more": more.cpu().numpy(),
            "mass": mass / mass.mean() if mass.any() else np.ones_like(mass),
        }

    found = team.measure(len(rows), measure, progress)
    more = np.stack([result["more"] for result in found]).astype(np.float64)
    means = {name: tuple(more[:, index].mean(0).tolist()) for index, name in enumerate(statistics)}
    curves = tuple(result["curves"] for result in found)
    if by == "layer":
        return Profile(curves, policy, captured.layers, captured.fingerprint, means)
    mass = np.stack([result["mass"] for result in found]).mean(0)
    counts = tuple(spec.kv_heads for spec in captured.layers)
    measured_heads = one_head_specs(captured.layers)
    return Profile(curves, policy, measured_heads, captured.fingerprint, {MASS: tuple(mass.tolist())}, counts)


def _check_by_head(captured: CapturedModel, scorer: Scorer, statistics: Sequence[str]) -> None:
    """Refuse what has no meaning for single KV heads."""
    check_scores_parts(scorer)
    if statistics:
        raise BudgetError(f"{', '.join(statistics)} are of layers, not of single KV heads; leave statistics out")
    if captured.shard.size > 1:
        raise BudgetError("by='head' is not taken for a model whose heads processes share; profile it in one process")


def _measuring(captured: CapturedModel, scorer: Scorer, statistics: tuple[str, ...]) -> Measure:
    """What gives the scores of every layer, and then each statistic of every layer, for token ids `[1, S]`.

    Raises:
        BudgetError: statistics of a scorer that reads prompts again.
    """
    reading = reading_of(scorer)
    if reading is not None:
        if statistics:
            raise BudgetError(f"{', '.join(statistics)} are of prompts that are read once; leave statistics out")
        model = cut_model(captured, scorer)
        return lambda ids: tuple(scores_of_second_reading(model, scorer, reading, ids).values())
    graph = run_pipeline(captured.graph("prompt"), profile_pipeline(scorer, statistics, captured.layers)).module

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        with torch.no_grad():
            measured: tuple[Tensor, ...] = graph(ids, positions, torch.ones_like(ids, dtype=torch.bool))
        return measured

    return run


def _check_prompt(index: int, ids: Tensor, captured: CapturedModel) -> Tensor:
    if ids.shape[1] < 2:
        raise PromptError(f"prompt {index} has {ids.shape[1]} tokens; a profile needs at least 2 to rank")
    return check_tokens(index, ids, captured)
