"""`fit_plan`: what could be best is tried, and the best on held-out prompts is taken.

In the order of what they cost: plans that need no measuring, plans solved from measured KL by layer, those by KV head.
Each is measured on the held-out prompts, and the best so far is handed out at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xkv_fx.budgets import Plan
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BudgetError, PromptError
from xkv_fx.formats import codes_keys
from xkv_fx.mean_keys import MeanKeys
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.data.profile_data import check_context
from xkv_fx.planning.fit.advice import advice_on_limit
from xkv_fx.planning.fit.clock import Clock, Decisions
from xkv_fx.planning.fit.data import Candidate, Fit, FitReport
from xkv_fx.planning.fit.even_plans import even_plan, even_plans
from xkv_fx.planning.fit.held_out import HeldOut, Row
from xkv_fx.planning.fit.settings import FitSettings
from xkv_fx.planning.fit_quality import smallest_plan
from xkv_fx.planning.measure.bootstrap import ratio_of_means
from xkv_fx.planning.measure.calibrate import CALIBRATE_CONTINUATION, measure_calibration
from xkv_fx.planning.measure.continuation import cut_model
from xkv_fx.planning.measure.mean_keys import gathered, means_of, sums_of_keys
from xkv_fx.planning.measure.verify import held_out_summary
from xkv_fx.planning.solve.plan import solve_plan
from xkv_fx.policy import Policy
from xkv_fx.runtime.scorers import check_scores_parts

Found = Callable[[Plan, str], None]
"""Called with each plan that is better than the one before, and with how it was made."""
Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`."""

# Shares of the time: until then, the first plan stands; capacities by layer are measured; those by head are.
_FIRST, _LAYERS, _HEADS = 0.1, 0.5, 0.85
_COST_BY_HEAD = 2.2  # of a prompt, over that by layer, as measured with three KV heads
_SCORER_PROMPTS = 4  # that scorers are compared on
_LADDER = (0.25, 0.5, 2.0, 4.0)  # times the limit, for what other limits would cost


def fit_plan(
    captured: CapturedModel,
    prompts: Sequence[Tensor],
    settings: FitSettings,
    later: Sequence[Row] = (),
    resume: Path | None = None,
    progress: Progress | None = None,
    found: Found | None = None,
) -> Fit:
    """See `xkv_fx.fit`.

    Args:
        captured: a model captured for one row.
        prompts: token ids, int64 `[1, S]`.
        later: texts with what comes in a second turn as their continuation; measured beside the held-out prompts.
        resume: a folder that exists, for what was measured.

    Raises:
        BudgetError, PromptError, UnsupportedModelError: see `xkv_fx.fit`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if resume is None else resume
        search = _Search(captured, prompts, settings, later, folder, progress, found)
        return search.run()


class _Search:
    def __init__(
        self,
        captured: CapturedModel,
        prompts: Sequence[Tensor],
        settings: FitSettings,
        later: Sequence[Row],
        folder: Path,
        progress: Progress | None,
        found: Found | None,
    ) -> None:
        self.clock = Clock(settings.seconds)
        self.captured, self.settings = captured, settings
        self.layers = captured.layers
        self.measured, rows = _split(prompts, settings.continuation)
        self.of_prompts = [ids for ids, _ in rows]
        self.held_out = HeldOut(captured, [*rows, *later], folder / "held_out.json")
        self.decisions = Decisions(folder / "decisions.json", settings.to_dict())
        self.folder, self.progress, self.found = folder, progress, found
        self.context = planned_context(prompts, settings.context, settings.continuation)
        self.full_bytes = Plan.full(len(self.layers), self.context).kv_bytes(self.layers, settings.batch_size)
        self.pairs = settings.pairs(self.layers)
        self.means: MeanKeys | None = None
        self.plans: dict[str, Plan] = {}
        self.kl: dict[str, NDArray[np.float64]] = {}
        self.left_out: list[str] = []
        self.best: str | None = None

    def run(self) -> Fit:
        if self.settings.kv_bytes is not None and self.settings.kv_bytes >= self._bytes_of_all():
            return self._fit_of_all()
        self.means = self._mean_keys()
        self._try_even_plans()
        scorers = self._scorers_by_worth()
        policy = next(one for one in self.settings.policies if one.scorer == scorers[0])
        calibrations = [made for by in ("layer", "head") if (made := self._calibrate(policy, by)) is not None]
        for calibration, by in calibrations:
            self._try_solved(calibration, by, scorers)
        if self.best is None:
            raise BudgetError(f"no plan that was tried keeps a held-out KL of {self.settings.kl}; ask for a larger kl")
        curve = self._curve([calibration for calibration, _ in calibrations])
        return self._result(curve)

    # A limit that holds everything

    def _bytes_of_all(self) -> int:
        """What a cache takes that keeps every token of the context, and of what is generated, in the model's dtype."""
        tokens = self.context + self.settings.max_new_tokens
        return Plan.full(len(self.layers), tokens).kv_bytes(self.layers, self.settings.batch_size)

    def _fit_of_all(self) -> Fit:
        settings = self.settings
        most = self.captured.facts.max_positions or 2**20
        limit = settings.kv_bytes or 0
        ring = settings.policies[-1]
        plan = even_plan(self.layers, ring, None, most, limit, settings.batch_size, 0)
        if plan is None:  # it holds the whole context, so it holds a slot
            raise BudgetError(f"{limit:,} bytes are less than one slot a layer takes")
        advice = (
            f"your limit needs no eviction: it holds {min(plan.capacities):,} tokens of every layer in the model's "
            f"dtype, and the context has {self.context:,}"
        )
        self.best = "all tokens, model"
        self.plans[self.best] = plan
        self.kl[self.best] = np.zeros(len(self.held_out.rows))
        return self._result(((limit, 0.0),), (advice,))

    # Candidates

    def _mean_keys(self) -> MeanKeys | None:
        """The mean keys over as many measured prompts as a part of the time allows; None where no keys are coded."""
        if not any(map(codes_keys, self.pairs)):
            return None
        model = cut_model(self.captured)
        sums: list[dict[str, NDArray[np.float64]]] = []

        def add(prompt: int) -> None:
            sums.append(sums_of_keys(model, self.measured[prompt].to(self.captured.device)))

        def while_there_is_time() -> int:
            for prompt in range(len(self.measured)):
                if sums and not self.clock.within(_FIRST / 2):
                    break
                add(prompt)
            return len(sums)

        count = self.decisions.decide("prompts of mean keys", while_there_is_time)
        for prompt in range(len(sums), count):
            add(prompt)
        tokens = sum(ids.shape[1] for ids in self.measured[:count])
        return gathered(means_of(sums, tokens, len(self.layers)), self.captured.shard, self.captured.device)

    def _try_even_plans(self) -> None:
        settings = self.settings
        limit = self._bytes_of_all() if settings.kv_bytes is None else settings.kv_bytes
        pairs = (None, *(pair for pair in self.pairs if pair is not None))
        plans: dict[str, Plan] = {}
        for eviction in settings.evictions:
            policy = next(one for one in settings.policies if one.eviction == eviction)
            most = self.context + (settings.max_new_tokens if eviction == "ring" else 0)
            of_eviction = even_plans(
                self.layers, policy, pairs, most, limit, settings.batch_size, settings.max_new_tokens, self.means
            )
            plans |= {self._named(name, policy): plan for name, plan in of_eviction.items()}
        if not plans:
            raise BudgetError(
                f"{limit:,} bytes are less than one slot a layer of {settings.batch_size} rows takes in "
                "any format; give more, or fewer rows"
            )
        self._report("plans without measuring", 0, 1)
        count = self.decisions.decide("first prompts", lambda: self._first_prompts(list(plans.values())))
        self._try(plans, count)
        self._try(plans)

    def _first_prompts(self, plans: Sequence[Plan]) -> int:
        return int(self.held_out.kl(plans, more=lambda done: self.clock.within(_FIRST)).shape[1])

    def _scorers_by_worth(self) -> list[str]:
        """The scorers, the one first under which a uniform plan in the model's dtype strays least on a few prompts."""
        settings = self.settings
        if len(settings.scorers) == 1 or settings.kv_bytes is None:
            return list(settings.scorers)
        first = settings.policies[0]
        plan = even_plan(
            self.layers, first, None, self.context, settings.kv_bytes, settings.batch_size, settings.max_new_tokens
        )
        if plan is None or min(plan.every_capacity) >= self.context:
            return list(settings.scorers)
        if not self.decisions.decide("compare scorers", lambda: int(self.clock.within(2 * _FIRST))):
            self.left_out.append(f"scorers but {settings.scorers[0]} were left out: no time")
            return list(settings.scorers[:1])
        plans = [
            dataclasses.replace(plan, policy=dataclasses.replace(first, scorer=scorer)) for scorer in settings.scorers
        ]
        kl = self.held_out.kl(plans, _SCORER_PROMPTS).mean(1)
        return [settings.scorers[index] for index in np.argsort(kl, kind="stable")]

    def _calibrate(self, policy: Policy, by: str) -> tuple[Calibration, str] | None:
        if by not in self.settings.by or (by == "head" and all(spec.kv_heads == 1 for spec in self.layers)):
            return None
        if by == "head" and (reason := self._no_heads(policy)) is not None:
            self.left_out.append(f"capacities by head were left out: {reason}")
            return None
        share = _LAYERS if by == "layer" else _HEADS
        count = self.decisions.decide(f"prompts by {by}", lambda: self._affordable(policy, by, share))
        if count == 0:
            self.left_out.append(f"capacities by {by} were left out: no time to measure a prompt")
            return None
        return self._measure(policy, by, count), by

    def _no_heads(self, policy: Policy) -> str | None:
        """Why KV heads cannot be measured alone; None if they can."""
        if self.captured.shard.size > 1:
            return "processes share the heads of this model"
        try:
            check_scores_parts(self.captured.scorer_of(policy))
        except BudgetError as error:
            return str(error)
        return None

    def _affordable(self, policy: Policy, by: str, share: float) -> int:
        """How many prompts there is time to measure, by what the first one took."""
        if self.settings.seconds is None:
            return len(self.measured)
        if by == "head":
            per_prompt = _COST_BY_HEAD * self._seconds_of_prompt
            return min(len(self.measured), self.clock.times(per_prompt, share) or 0)
        start = self.clock.spent
        self._measure(policy, by, 1)
        self._seconds_of_prompt = self.clock.spent - start
        return 1 + min(len(self.measured) - 1, self.clock.times(self._seconds_of_prompt, share) or 0)

    _seconds_of_prompt = 0.0

    def _measure(self, policy: Policy, by: str, count: int) -> Calibration:
        return measure_calibration(
            self.captured,
            self.measured[:count],
            policy,
            progress=lambda done, total: self._report(f"measuring by {by}", done, total),
            resume=self.folder,
            formats=tuple(("model", "model") if pair is None else pair for pair in self.pairs),
            continuation=CALIBRATE_CONTINUATION,
            means=self.means,
            by=by,
        )

    def _try_solved(self, calibration: Calibration, by: str, scorers: Sequence[str]) -> None:
        settings = self.settings
        what = "capacities" if len(self.pairs) == 1 else "capacities and formats"
        if settings.kl is not None:
            with contextlib.suppress(BudgetError):  # none keeps the bound; another candidate may
                plan = smallest_plan(
                    self.captured, calibration, self.of_prompts, settings.kl, self.context, settings.multiple,
                    continuation=settings.continuation,
                )  # fmt: skip
                self._try({f"{what} by {by}": plan})
            return
        plan = self._solved(calibration, settings.kv_bytes or 0)
        plans = {self._named(f"{what} by {by}", plan.policy): plan}
        for policy in settings.policies:
            if policy != plan.policy and policy.scorer in scorers[:2]:
                other = self._solved(dataclasses.replace(calibration, policy=policy), settings.kv_bytes or 0)
                plans[self._named(f"{what} by {by}", policy)] = other
        self._try(plans)

    def _solved(self, calibration: Calibration, kv_bytes: int) -> Plan:
        settings = self.settings
        return solve_plan(
            calibration,
            kv_bytes=kv_bytes,
            context=self.context,
            multiple=settings.multiple,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
        )

    def _named(self, name: str, policy: Policy) -> str:
        parts = [name]
        if len(self.settings.evictions) > 1:
            parts.append(policy.eviction)
        if policy.scorer != self.settings.scorers[0]:
            parts.append(policy.scorer)
        return ", ".join(parts)

    def _try(self, plans: dict[str, Plan], prompts: int | None = None) -> None:
        """Measure plans on the held-out prompts, and hand out the best so far."""
        kl = self.held_out.kl(list(plans.values()), prompts)
        self.plans |= plans
        self.kl |= dict(zip(plans, kl, strict=True))
        best = min(self._allowed(), key=self._rank, default=None)
        if best is not None and best != self.best:
            self.best = best
            if self.found is not None:
                self.found(self._with_provenance(best), best)

    def _allowed(self) -> list[str]:
        bound = self.settings.kl
        return [name for name, kl in self.kl.items() if bound is None or kl.mean() <= bound]

    def _rank(self, name: str) -> tuple[float, int]:
        """Lower is better: the KL at the limit in bytes, or the bytes at the bound on the KL."""
        return (self._bytes(name), 0) if self.settings.kl is not None else (float(self.kl[name].mean()), 0)

    def _bytes(self, name: str) -> int:
        return self.plans[name].kv_bytes(
            self.layers, self.settings.batch_size, max_new_tokens=self.settings.max_new_tokens
        )

    # The result

    def _curve(self, calibrations: Sequence[Calibration]) -> tuple[tuple[int, float], ...]:
        """What other limits would cost: plans made as the best one was, on the held-out prompts."""
        chosen = self.plans[self.best or ""]
        calibration = calibrations[-1] if calibrations else None
        points = {self._bytes(self.best or ""): float(self.kl[self.best or ""].mean())}
        if calibration is None:
            return tuple(points.items())
        calibration = dataclasses.replace(calibration, policy=chosen.policy)
        plans: dict[int, Plan] = {}
        for factor in _LADDER:
            limit = int(factor * self._bytes(self.best or ""))
            if limit >= self._bytes_of_all():
                points[self._bytes_of_all()] = 0.0
                continue
            try:
                plans[limit] = self._solved(calibration, limit)
            except BudgetError:  # less than one slot a layer
                continue
        if plans:
            kl = self.held_out.kl(list(plans.values())).mean(1)
            points |= dict(zip(plans, kl.tolist(), strict=True))
        return tuple(sorted(points.items()))

    def _with_provenance(self, name: str) -> Plan:
        plan, kl = self.plans[name], self.kl[name].tolist()
        limit = self._limit()
        provenance = dataclasses.replace(
            plan.provenance,
            model=self.captured.fingerprint,
            allocator=plan.provenance.allocator or "uniform",
            constraint=plan.provenance.constraint or limit,
            context=self.context,
            held_out=held_out_summary(kl, self.settings.continuation),
        )
        return dataclasses.replace(plan, provenance=provenance)

    def _limit(self) -> dict[str, float]:
        """As `solve` writes it into a plan, which `transform` then holds to."""
        settings = self.settings
        if settings.kv_bytes is None:
            return {"kl": settings.kl or 0.0}
        room = {"max_new_tokens": settings.max_new_tokens} if settings.max_new_tokens else {}
        return {"kv_bytes": settings.kv_bytes, "batch_size": settings.batch_size, **room}

    def _result(self, curve: tuple[tuple[int, float], ...], advice: tuple[str, ...] | None = None) -> Fit:
        best = self.best or ""
        ours = self.kl[best]
        order = sorted(self._allowed(), key=self._rank)
        order += sorted((name for name in self.kl if name not in order), key=lambda name: float(self.kl[name].mean()))
        candidates = tuple(
            Candidate(
                name,
                self.plans[name],
                self._bytes(name),
                tuple(self.kl[name].tolist()),
                ratio_of_means(ours, self.kl[name]),
            )
            for name in order
        )
        report = FitReport(
            limit=self.settings.kv_bytes,
            bound=self.settings.kl,
            full_bytes=self.full_bytes,
            context=self.context,
            batch_size=self.settings.batch_size,
            measured=len(self.measured),
            held_out=len(self.held_out.rows),
            curve=curve,
            advice=self._advice(candidates[0], curve) if advice is None else advice,
            left_out=tuple(self.left_out),
        )
        return Fit(self._with_provenance(best), report, candidates)

    def _advice(self, chosen: Candidate, curve: tuple[tuple[int, float], ...]) -> tuple[str, ...]:
        return () if self.settings.kv_bytes is None else advice_on_limit(chosen, curve)

    def _report(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)


def planned_context(prompts: Sequence[Tensor], context: int | None, continuation: int) -> int:
    """The tokens of prompt that a plan is for: those asked for, or of the longest prompt before its continuation."""
    longest = max(ids.shape[1] for ids in prompts) - continuation
    return max(1, longest) if context is None else check_context(context)


def _split(prompts: Sequence[Tensor], continuation: int) -> tuple[list[Tensor], list[Row]]:
    """Every other prompt is held out.

    Raises:
        PromptError: fewer than two, or one that is too short to hold its continuation out.
    """
    if len(prompts) < 2:
        raise PromptError(
            f"got {len(prompts)} prompts; at least 2 are needed, since every other one is held out. Split a long text "
            "into several"
        )
    least = max(continuation, CALIBRATE_CONTINUATION) + 2
    for index, ids in enumerate(prompts):
        if ids.shape[1] < least:
            raise PromptError(
                f"prompt {index} has {ids.shape[1]} tokens; with {continuation} of them as its continuation, at least "
                f"{least} are needed. Give longer prompts, or a smaller continuation"
            )
    return list(prompts[0::2]), [(ids, continuation) for ids in prompts[1::2]]
