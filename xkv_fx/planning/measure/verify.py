"""How far plans stray from the full cache on prompts that they were not made from, and how certain that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xkv_fx.budgets import AnyPlan, Plan
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BudgetError, PromptError
from xkv_fx.layers import LayerSpec
from xkv_fx.planning.measure.bootstrap import Estimate, ratio_of_means
from xkv_fx.planning.measure.calibrate import check_measurable, check_prompt, cut_checked
from xkv_fx.planning.measure.continuation import layer_plans, run_full
from xkv_fx.planning.measure.team import Progress
from xkv_fx.planning.solve.plan import uniform_within_bytes
from xkv_fx.policy import Policy

VERIFY_CONTINUATION = 48


@dataclasses.dataclass(frozen=True)
class Verification:
    """A plan beside a uniform one of equal bytes on held-out prompts.

    Attributes:
        kl: KL(full || plan) of each prompt, nats, the mean over its continuation.
        uniform_kl: the same for the uniform plan.
        uniform: the capacities that it was compared with.
        ratio: mean of `kl` over mean of `uniform_kl`.
        continuation: tokens that were fed after each prompt.
    """

    kl: tuple[float, ...]
    uniform_kl: tuple[float, ...]
    uniform: tuple[int, ...]
    ratio: Estimate
    continuation: int

    @property
    def better(self) -> bool:
        """Whether the plan is better than uniform beyond chance: the whole interval of the ratio lies below 1."""
        return self.ratio.high < 1.0

    def to_dict(self) -> dict[str, Any]:
        """What `Provenance.held_out` stores."""
        return {
            "prompts": len(self.kl),
            "continuation": self.continuation,
            **{f"{name}_kl": value for name, value in summary(self.kl).items()},
            **{f"uniform_{name}_kl": value for name, value in summary(self.uniform_kl).items()},
            "ratio": self.ratio.value,
            "ratio_low": self.ratio.low,
            "ratio_high": self.ratio.high,
        }

    def stored_in(self, budgets: AnyPlan) -> AnyPlan:
        """The plan with this in its provenance."""
        provenance = dataclasses.replace(budgets.provenance, held_out=self.to_dict())
        return dataclasses.replace(budgets, provenance=provenance)

    def uniform_plan(self, budgets: AnyPlan) -> AnyPlan:
        """The uniform plan of equal bytes in the place of `budgets`, saying so, with this in its provenance."""
        provenance = dataclasses.replace(
            budgets.provenance,
            allocator="uniform",
            expected_retention=None,
            expected_kl=None,
            held_out={**self.to_dict(), "instead_of": budgets.provenance.allocator or "a plan by hand"},
        )
        return dataclasses.replace(budgets, capacities=self.uniform, provenance=provenance)

    def __str__(self) -> str:
        plan, uniform = summary(self.kl), summary(self.uniform_kl)
        return (
            f"mean KL {plan['mean']:.4f} against {uniform['mean']:.4f} uniform: {self.ratio.value - 1:+.0%} "
            f"({self.ratio.low - 1:+.0%} to {self.ratio.high - 1:+.0%}, 95 %, {len(self.kl)} prompts); median "
            f"{plan['median']:.4f} against {uniform['median']:.4f}, 95th percentile {plan['p95']:.4f} against "
            f"{uniform['p95']:.4f}"
        )


def summary(kl: Sequence[float]) -> dict[str, float]:
    """Mean, median and 95th percentile over prompts."""
    return {"mean": float(np.mean(kl)), "median": float(np.median(kl)), "p95": float(np.percentile(kl, 95))}


def verify_plans(
    captured: CapturedModel,
    plans: Sequence[Plan],
    prompts: Sequence[Tensor],
    continuation: int = VERIFY_CONTINUATION,
    progress: Progress | None = None,
) -> tuple[Verification, ...]:
    """Compare each plan with a uniform one of equal bytes, all in one pass over the prompts; see `xkv_fx.verify`."""
    _one_policy(plans)
    for plan in plans:
        plan.check_layers(captured.layers, captured.fingerprint)
    even = [uniform_like(plan, captured.layers) for plan in plans]
    capacities = {plan.capacities: plan for plan in (*plans, *even)}
    kl = divergence_of_plans(captured, tuple(capacities.values()), prompts, continuation, progress).mean(2)
    of = dict(zip(capacities, kl.T, strict=True))
    reports = []
    for plan, uniform in zip(plans, even, strict=True):
        ours, theirs = of[plan.capacities], of[uniform.capacities]
        ratio = ratio_of_means(ours, theirs)
        reports.append(
            Verification(tuple(ours.tolist()), tuple(theirs.tolist()), uniform.capacities, ratio, continuation)
        )
    return tuple(reports)


def divergence_of_plans(
    captured: CapturedModel,
    plans: Sequence[Plan],
    prompts: Sequence[Tensor],
    continuation: int = VERIFY_CONTINUATION,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """KL(full || plan) of each prompt, plan and continuation token, nats; one prefill a prompt serves all plans.

    Args:
        captured: a model captured for one row.
        plans: of one policy.
        prompts: int64 `[1, S + continuation]`; the last tokens are the continuation, fed as decode would.

    Returns:
        float64 `[prompts, plans, continuation]`.

    Raises:
        BudgetError, ModelMismatchError, PromptError, UnsupportedModelError: see `xkv_fx.verify`.
    """
    policy = _one_policy(plans)
    check_measurable(policy, continuation)
    for plan in plans:
        plan.check_layers(captured.layers, captured.fingerprint)
    scorer = captured.scorer_of(policy)
    rows = [check_prompt(index, ids, captured, continuation) for index, ids in enumerate(prompts)]
    if not rows:
        raise PromptError("there are no prompts to measure on; give at least one")
    model = cut_checked(captured, scorer, rows[0], continuation)
    held = [layer_plans(plan, captured.layers, continuation) for plan in plans]
    results = []
    for done, ids in enumerate(rows, start=1):
        kl = run_full(model, scorer, ids, continuation).divergence(held)
        if not bool(torch.isfinite(kl).all()):
            raise PromptError(f"the model's output on prompt {done - 1} is not finite; does its dtype overflow?")
        results.append(kl.numpy())
        if progress is not None:
            progress(done, len(rows))
    return np.stack(results)


def _one_policy(plans: Sequence[Plan]) -> Policy:
    policies = {plan.policy for plan in plans}
    if len(policies) != 1:
        raise BudgetError(f"plans that are measured together must have one policy; got {len(policies)}")
    return policies.pop()


def uniform_like(budgets: AnyPlan, layers: Sequence[LayerSpec]) -> AnyPlan:
    """The largest uniform plan of at most the same bytes, of exactly the same where slots are of equal size.

    Raises:
        BudgetError: another number of layers.
    """
    budgets.check_layers(layers)
    capacities = [spec.effective_capacity(c) for spec, c in zip(layers, budgets.capacities, strict=True)]
    context = max(budgets.provenance.context or 1, *capacities)
    kv_bytes = sum(spec.slot_bytes() * capacity for spec, capacity in zip(layers, capacities, strict=True))
    even = uniform_within_bytes(layers, context, kv_bytes)
    plain = type(budgets).uniform(len(layers), 1, budgets.policy)
    return dataclasses.replace(plain, capacities=tuple(even.tolist()))


def held_out_summary(kl: Sequence[float], continuation: int) -> Mapping[str, Any]:
    """What `fit_quality` stores: the held-out divergence of the plan that it found."""
    return {"prompts": len(kl), "continuation": continuation, **{f"{k}_kl": v for k, v in summary(kl).items()}}
