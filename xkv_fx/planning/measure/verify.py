"""How far plans stray from the full cache on prompts that they were not made from, and how certain that is."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xkv_fx.budgets import AnyPlan, Plan
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BudgetError, PromptError
from xkv_fx.formats import LayerFormats, pair_name
from xkv_fx.layers import LayerSpec, with_itemsize
from xkv_fx.planning.data.grid import can_store
from xkv_fx.planning.measure.bootstrap import Estimate, ratio_of_means
from xkv_fx.planning.measure.calibrate import check_measurable, check_prompt, cut_checked
from xkv_fx.planning.measure.continuation import layer_plans, run_full
from xkv_fx.planning.measure.team import Progress
from xkv_fx.planning.solve.plan import uniform_within_bytes
from xkv_fx.policy import Policy

VERIFY_CONTINUATION = 48
SINGLE_FORMATS: tuple[LayerFormats, ...] = (("int8", "int8"), ("int8", "int4"), ("int4", "int4"))
"""What plans are compared with where one format is for all layers."""


@dataclasses.dataclass(frozen=True)
class SingleFormat:
    """The best plan of equal bytes that stores all layers alike: every token where that fits, else equal capacities.

    Attributes:
        formats: of keys and values.
        capacities: of each layer.
        kl: KL(full || this plan) of each prompt, nats, the mean over its continuation.
        ratio: mean of the compared plan's KL over mean of `kl`.
    """

    formats: LayerFormats
    capacities: tuple[int, ...]
    kl: tuple[float, ...]
    ratio: Estimate

    def __str__(self) -> str:
        low, high = min(self.capacities), max(self.capacities)
        tokens = f"{low}" if low == high else f"{low} to {high}"
        return f"all layers in {pair_name(self.formats)}, {tokens} tokens each"


@dataclasses.dataclass(frozen=True)
class Verification:
    """A plan beside others of equal bytes on held-out prompts: a uniform one, and one format for all layers.

    Attributes:
        kl: KL(full || plan) of each prompt, nats, the mean over its continuation.
        uniform_kl: the same for the uniform plan, which stores in the model's dtype.
        uniform: the capacities that it was compared with.
        ratio: mean of `kl` over mean of `uniform_kl`.
        continuation: tokens that were fed after each prompt.
        single: the best plan of a single format; None where the model can be stored in none.
    """

    kl: tuple[float, ...]
    uniform_kl: tuple[float, ...]
    uniform: tuple[int, ...]
    ratio: Estimate
    continuation: int
    single: SingleFormat | None = None

    @property
    def better(self) -> bool:
        """Whether the plan is better than uniform beyond chance: the whole interval of the ratio lies below 1."""
        return self.ratio.high < 1.0

    @property
    def best(self) -> str | None:
        """Which of `"plan"`, `"uniform"` and `"single format"` is better than the others beyond chance: the whole
        intervals of its ratios to them lie below 1. None where chance may decide."""
        kl = {"plan": self.kl, "uniform": self.uniform_kl}
        if self.single is not None:
            kl["single format"] = self.single.kl
        name = min(kl, key=lambda one: float(np.mean(kl[one])))
        ours = np.array(kl[name])
        others = (np.array(kl[other]) for other in kl if other != name)
        return name if all(ratio_of_means(ours, theirs).high < 1.0 for theirs in others) else None

    @property
    def rival(self) -> str:
        """In words, the better one by its mean of the plans that this one was compared with."""
        return "uniform" if self._rival is None else str(self._rival)

    @property
    def _rival(self) -> SingleFormat | None:
        """The plan of a single format where it is better than the uniform one."""
        single = self.single
        return single if single is not None and np.mean(single.kl) < np.mean(self.uniform_kl) else None

    def to_dict(self) -> dict[str, Any]:
        """What `Provenance.held_out` stores."""
        return {
            "prompts": len(self.kl),
            "continuation": self.continuation,
            **{f"{name}_kl": value for name, value in summary(self.kl).items()},
            **{f"uniform_{name}_kl": value for name, value in summary(self.uniform_kl).items()},
            **_ratio_fields("ratio", self.ratio),
            **({} if self.single is None else self._single_fields(self.single)),
        }

    def _single_fields(self, single: SingleFormat) -> dict[str, Any]:
        return {
            "single_format": list(single.formats),
            "single_format_tokens": sum(single.capacities),
            **{f"single_format_{name}_kl": value for name, value in summary(single.kl).items()},
            **_ratio_fields("single_format_ratio", single.ratio),
            "best": self.best,
        }

    def stored_in(self, budgets: AnyPlan) -> AnyPlan:
        """The plan with this in its provenance."""
        provenance = dataclasses.replace(budgets.provenance, held_out=self.to_dict())
        return dataclasses.replace(budgets, provenance=provenance)

    def uniform_plan(self, budgets: AnyPlan) -> AnyPlan:
        """The uniform plan of equal bytes in the place of `budgets`, saying so, with this in its provenance."""
        return self._instead(budgets, "uniform", self.uniform, None)

    def single_format_plan(self, budgets: AnyPlan) -> AnyPlan:
        """The plan of a single format in the place of `budgets`, saying so, with this in its provenance.

        Raises:
            BudgetError: the plan was not compared with one.
        """
        if self.single is None:
            raise BudgetError("this plan was not compared with a single format, since the model can be stored in none")
        single = self.single
        return self._instead(budgets, "single format", single.capacities, (single.formats,) * len(single.capacities))

    def rival_plan(self, budgets: AnyPlan) -> AnyPlan:
        """The one of these two that `rival` names."""
        return self.uniform_plan(budgets) if self._rival is None else self.single_format_plan(budgets)

    def _instead(
        self,
        budgets: AnyPlan,
        allocator: str,
        capacities: tuple[int, ...],
        formats: tuple[LayerFormats, ...] | None,
    ) -> AnyPlan:
        provenance = dataclasses.replace(
            budgets.provenance,
            allocator=allocator,
            expected_retention=None,
            expected_kl=None,
            kv_bytes=None,
            held_out={**self.to_dict(), "instead_of": budgets.provenance.allocator or "a plan by hand"},
        )
        return dataclasses.replace(budgets, capacities=capacities, formats=formats, provenance=provenance)

    def __str__(self) -> str:
        plan, uniform = summary(self.kl), summary(self.uniform_kl)
        said = (
            f"mean KL {plan['mean']:.4f} against {uniform['mean']:.4f} uniform: {_change(self.ratio)}, 95 %, "
            f"{len(self.kl)} prompts); median {plan['median']:.4f} against {uniform['median']:.4f}, 95th percentile "
            f"{plan['p95']:.4f} against {uniform['p95']:.4f}"
        )
        if self.single is None:
            return said
        best = {None: "none beyond chance", "plan": "the plan", "single format": "the single format"}
        return (
            f"{said}\nagainst {summary(self.single.kl)['mean']:.4f} with {self.single}: {_change(self.single.ratio)}); "
            f"best of the three: {best.get(self.best, self.best)}"
        )


def _change(ratio: Estimate) -> str:
    return f"{ratio.value - 1:+.0%} ({ratio.low - 1:+.0%} to {ratio.high - 1:+.0%}"


def _ratio_fields(name: str, ratio: Estimate) -> dict[str, float]:
    return {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}


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
    """Compare each plan with others of equal bytes, all in one pass over the prompts; see `xkv_fx.verify`."""
    _one_policy(plans)
    for plan in plans:
        plan.check_layers(captured.layers, captured.fingerprint)
    longest = max((ids.shape[1] - continuation for ids in prompts), default=0)
    counted = [counted_layers(plan, captured.layers) for plan in plans]
    even = [uniform_like(plan, layers) for plan, layers in zip(plans, counted, strict=True)]
    single = [single_formats_like(plan, layers, longest) for plan, layers in zip(plans, counted, strict=True)]
    alike = itertools.chain.from_iterable(of_plan.values() for of_plan in single)
    measured = {_stored(plan): plan for plan in (*plans, *even, *alike)}
    kl = divergence_of_plans(captured, tuple(measured.values()), prompts, continuation, progress).mean(2)
    of = dict(zip(measured, kl.T, strict=True))
    reports = []
    for plan, uniform, of_plan in zip(plans, even, single, strict=True):
        ours, theirs = of[_stored(plan)], of[_stored(uniform)]
        best: SingleFormat | None = None
        for pair, other in of_plan.items():
            kl_of_other = of[_stored(other)]
            if best is None or kl_of_other.mean() < np.mean(best.kl):
                ratio = ratio_of_means(ours, kl_of_other)
                best = SingleFormat(pair, other.layer_means, tuple(kl_of_other.tolist()), ratio)
        reports.append(
            Verification(
                tuple(ours.tolist()),
                tuple(theirs.tolist()),
                uniform.layer_means,
                ratio_of_means(ours, theirs),
                continuation,
                best,
            )
        )
    return tuple(reports)


def _stored(plan: Plan) -> tuple[object, ...]:
    """All that tells plans of one policy apart."""
    return plan.capacities, plan.layer_formats, plan.mean_keys


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
    held = [layer_plans(plan, captured.layers, continuation, captured.shard) for plan in plans]
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


def counted_layers(budgets: Plan, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The layers with the bytes of an element that the plan was solved for, as its constraint says: a plan for a
    bfloat16 model may be measured in float32, and its bytes are still those of bfloat16."""
    itemsize = (budgets.provenance.constraint or {}).get("itemsize")
    return with_itemsize(layers, None if itemsize is None else int(itemsize))


def uniform_like(budgets: AnyPlan, layers: Sequence[LayerSpec]) -> AnyPlan:
    """The largest uniform plan of at most the same bytes in the model's dtype, of exactly the same where slots are of
    equal size. Room that `budgets` holds inside its limit is counted; where it takes all the bytes, one slot is left.

    Raises:
        BudgetError: another number of layers, or formats that they cannot be stored in.
    """
    return _alike(budgets, layers, _context_of(budgets, layers), None)


def single_formats_like(budgets: AnyPlan, layers: Sequence[LayerSpec], longest: int) -> dict[LayerFormats, AnyPlan]:
    """The largest plans of at most the same bytes that store all layers alike in fewer bits, for each pair of formats
    that the layers can be stored in and that the bytes pay a slot of.

    Args:
        longest: tokens of the longest prompt, all of which are kept where the bytes suffice.
    """
    context, kv_bytes = max(longest, _context_of(budgets, layers)), _bytes_of(budgets, layers)
    return {
        pair: _alike(budgets, layers, context, pair)
        for pair in SINGLE_FORMATS
        if can_store(layers, pair) and _bytes_of(_one_slot(budgets, pair), layers) <= kv_bytes
    }


def _context_of(budgets: Plan, layers: Sequence[LayerSpec]) -> int:
    """The tokens that a plan is for: those that it was solved for, or the most that one of its layers holds."""
    return max(budgets.provenance.context or 1, *(group.capacity for group in budgets.groups(layers)))


def _room_of(budgets: Plan) -> int:
    """The room for appended tokens that a plan holds inside its limit in bytes, which plans in its place must, too."""
    return int((budgets.provenance.constraint or {}).get("max_new_tokens", 0))


def _bytes_of(budgets: Plan, layers: Sequence[LayerSpec]) -> int:
    """Of one row, with that room."""
    return budgets.kv_bytes(layers, max_new_tokens=_room_of(budgets))


def _one_slot(budgets: AnyPlan, formats: LayerFormats | None) -> AnyPlan:
    """The plan of one slot a layer in the place of `budgets`."""
    layers = len(budgets.capacities)
    return dataclasses.replace(budgets, capacities=(1,) * layers, formats=(formats,) * layers)


def _alike(budgets: AnyPlan, layers: Sequence[LayerSpec], context: int, formats: LayerFormats | None) -> AnyPlan:
    """The largest plan of equal capacities and formats that takes at most the bytes of `budgets`."""
    kv_bytes = max(_bytes_of(budgets, layers), _bytes_of(_one_slot(budgets, formats), layers))
    capacities = uniform_within_bytes(layers, context, kv_bytes, formats, budgets.policy, _room_of(budgets))
    plain = type(budgets).uniform(len(layers), 1, budgets.policy)
    return dataclasses.replace(
        plain,
        capacities=tuple(capacities.tolist()),
        formats=(formats,) * len(layers),
        mean_keys=budgets.mean_keys,  # which cost the other plan nothing either
    )


def held_out_summary(kl: Sequence[float], continuation: int) -> Mapping[str, Any]:
    """What `fit_quality` stores: the held-out divergence of the plan that it found."""
    return {"prompts": len(kl), "continuation": continuation, **{f"{k}_kl": v for k, v in summary(kl).items()}}
