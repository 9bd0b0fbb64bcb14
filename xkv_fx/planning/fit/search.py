"""`fit_plan`: what could be best is tried, and the best on held-out prompts is taken.

In the order of what they cost: plans that need no measuring, plans solved from measured KL by layer, those by KV head.
Each is measured on the held-out prompts, and the best so far is handed out at once.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
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
from xkv_fx.planning.fit.data import Fit, FitReport
from xkv_fx.planning.fit.even_plans import even_plan, even_plans
from xkv_fx.planning.fit.settings import FitSettings
from xkv_fx.planning.fit.tried import Found, Tried
from xkv_fx.planning.fit_quality import smallest_plan
from xkv_fx.planning.measure.calibrate import CALIBRATE_CONTINUATION, measure_calibration
from xkv_fx.planning.measure.continuation import cut_model
from xkv_fx.planning.measure.held_out import HeldOut, Row, remove_held_out
from xkv_fx.planning.measure.mean_keys import gathered, means_of, sums_of_keys
from xkv_fx.planning.measure.partial_results import remove_parts
from xkv_fx.planning.measure.points import cost_by_head
from xkv_fx.planning.solve.plan import solve_plan
from xkv_fx.policy import Policy
from xkv_fx.runtime.scorers import check_scores_parts

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`."""

# Shares of the time: until then, the first plan stands; capacities by layer are measured; those by head are.
_FIRST, _LAYERS, _HEADS = 0.1, 0.5, 0.85
_HELD_OUT = 0.05  # that plans may take on the held-out prompts each time they are measured there
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
        return _Search(captured, prompts, settings, later, folder, progress, found).run()


def remove_fit_parts(folder: Path) -> None:
    """Delete what was kept in a `resume` folder, and the folder unless something else is in it."""
    (folder / "decisions.json").unlink(missing_ok=True)
    remove_held_out(folder / "held_out")
    remove_parts(folder)


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
        self.held_out_prompts = [ids for ids, _ in rows]
        self.held_out = HeldOut(captured, [*later, *rows], folder / "held_out")
        self.compared_on = len(self.held_out.rows)
        self.decisions = Decisions(folder / "decisions.json", settings.to_dict())
        self.folder, self.progress = folder, progress
        self.context = planned_context(prompts, settings.context, settings.continuation)
        self.tried = Tried(settings, self.held_out, self.context, found)
        self.pairs = settings.pairs(self.layers)
        self.means: MeanKeys | None = None
        self.solved_from = 0
        self.left_out: list[str] = []

    def run(self) -> Fit:
        limit = self.settings.kv_bytes
        if limit is not None and limit >= self._bytes_of_all():
            return self._fit_of_all(limit)
        self.means = self._mean_keys()
        self._try_even_plans()
        scorers = self._scorers_by_worth()
        policy = next(one for one in self.settings.policies if one.scorer == scorers[0])
        calibration: Calibration | None = None
        for by in ("layer", "head"):
            if by in self.settings.by and (measured := self._calibrate(policy, by)) is not None:
                calibration = measured
                self._try_solved(measured, by, scorers)
        best = self.tried.best
        if best is None:
            raise BudgetError(f"no plan that was tried keeps a held-out KL of {self.settings.kl}; ask for a larger kl")
        curve = self._curve(best, calibration)
        advice = () if limit is None else advice_on_limit(self.tried.candidates(best)[0], curve)
        return self._result(best, curve, advice)

    # A limit that holds everything

    def _bytes_of_all(self) -> int:
        """What a cache takes that keeps every token of the context, and of what is generated, in the model's dtype."""
        return self._bytes_of_full(self.context + self.settings.max_new_tokens)

    def _bytes_of_full(self, tokens: int) -> int:
        return Plan.full(len(self.layers), tokens).kv_bytes(self.layers, self.settings.batch_size)

    def _fit_of_all(self, limit: int) -> Fit:
        settings = self.settings
        most = self.captured.max_positions or limit  # more slots than bytes there cannot be
        plan = even_plan(self.layers, settings.policies[-1], None, most, limit, settings.batch_size, 0)
        if plan is None:  # it holds the whole context, so it holds a slot
            raise BudgetError(f"{limit:,} bytes are less than one slot a layer takes")
        kept, name = min(plan.every_capacity), "all tokens, model"
        longest = max(ids.shape[1] for ids, _ in self.held_out.rows)
        if longest <= kept:  # nothing is evicted, so nothing strays
            self.tried.add_measured({name: plan}, {name: np.zeros(self.compared_on)})
        else:
            self.tried.add({name: plan})
        advice = (
            f"your limit needs no eviction: it holds {kept:,} tokens of every layer in the model's dtype, and the "
            f"context has {self.context:,}"
        )
        return self._result(name, ((limit, self.tried.kl(name)),), (advice,))

    # Plans that need no calibration

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
        self.tried.add(plans, self._prompts_of_first_plan(list(plans.values())))
        self.tried.add(plans, self.compared_on)

    def _prompts_of_first_plan(self, plans: Sequence[Plan]) -> int:
        """On how many held-out prompts the first plan is chosen; and it is decided how many the others are."""

        def while_there_is_time() -> int:
            return len(self.held_out.measure(plans, more=lambda: self.clock.within(_FIRST)).kl)

        self.held_out.measure(plans[:1], 1)  # cuts the model, once for all prompts
        seconds = self._seconds_of("a held-out prompt", lambda: self.held_out.measure(plans, 1))
        first = self.decisions.decide("first prompts", while_there_is_time)
        whole = self.compared_on
        self.compared_on = self.decisions.decide(
            "held-out prompts", lambda: min(whole, max(first, self.clock.times_in(_HELD_OUT, seconds, whole)))
        )
        if self.compared_on < whole:
            self.left_out.append(
                f"{whole - self.compared_on} of {whole} held-out prompts were left out: no time to compare on them"
            )
        return first

    def _seconds_of(self, what: str, run: Callable[[], object]) -> float:
        """What a first run takes. It is decided: a run that goes on has the results of the first one, and is faster."""

        def milliseconds() -> int:
            started = time.monotonic()
            run()
            return 1 + int(1000 * (time.monotonic() - started))

        return self.decisions.decide(f"milliseconds of {what}", milliseconds) / 1000

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
        kl = self.held_out.measure(plans, min(_SCORER_PROMPTS, self.compared_on)).kl.mean(0)
        return [settings.scorers[index] for index in np.argsort(kl, kind="stable")]

    # Plans solved from what is measured

    def _calibrate(self, policy: Policy, by: str) -> Calibration | None:
        if by == "head":
            if all(spec.kv_heads == 1 for spec in self.layers):
                return None
            if (reason := self._no_heads(policy)) is not None:
                self.left_out.append(f"capacities by head were left out: {reason}")
                return None
        count = self._affordable(policy, by)
        if count == 0:
            self.left_out.append(f"capacities by {by} were left out: no time to measure a prompt")
            return None
        if count < len(self.measured):
            self.left_out.append(
                f"capacities by {by} were measured on {count} of {len(self.measured)} prompts: no time"
            )
        self.solved_from = max(self.solved_from, count)
        return self._measure(policy, by, count)

    def _no_heads(self, policy: Policy) -> str | None:
        """Why KV heads cannot be measured alone; None if they can."""
        if self.captured.shard.size > 1:
            return "processes share the heads of this model"
        try:
            check_scores_parts(self.captured.scorer_of(policy))
        except BudgetError as error:
            return str(error)
        return None

    def _affordable(self, policy: Policy, by: str) -> int:
        """How many prompts there is time to measure, by what the first one takes by layer."""
        whole = len(self.measured)
        if self.settings.seconds is None:
            return whole
        seconds = self._seconds_of("a prompt", lambda: self._measure(policy, "layer", 1))
        if by == "layer":  # the first one has been measured
            return self.decisions.decide(
                "prompts by layer", lambda: min(whole, 1 + self.clock.times_until(_LAYERS, seconds, whole))
            )
        cost = cost_by_head(self.pairs, self.captured.layers)
        return self.decisions.decide("prompts by head", lambda: self.clock.times_until(_HEADS, cost * seconds, whole))

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
        name = f"{'capacities' if len(self.pairs) == 1 else 'capacities and formats'} by {by}"
        if settings.kl is not None:
            try:
                plan = smallest_plan(
                    self.captured, calibration, self.held_out_prompts, settings.kl, self.context, settings.multiple,
                    continuation=settings.continuation,
                )  # fmt: skip
            except BudgetError as error:  # none keeps the bound; another candidate may
                self.left_out.append(f"{name} were left out: {error}")
            else:
                self.tried.add({name: plan}, self.compared_on)
            return
        plans: dict[str, Plan] = {}
        for policy in settings.policies:
            if policy != calibration.policy and policy.scorer not in scorers[:2]:
                continue
            try:
                plans[self._named(name, policy)] = self._solved(calibration, settings.kv_bytes or 0, policy)
            except BudgetError as error:  # the room for new tokens takes all bytes; without it there may be a plan
                self.left_out.append(f"{self._named(name, policy)} were left out: {error}")
        if plans:
            self.tried.add(plans, self.compared_on)

    def _solved(self, calibration: Calibration, kv_bytes: int, policy: Policy) -> Plan:
        """The plan of at most so many bytes, served by a policy that may not be the one that was measured."""
        settings = self.settings
        plan = solve_plan(
            dataclasses.replace(calibration, policy=policy),
            kv_bytes=kv_bytes,
            context=self.context,
            multiple=settings.multiple,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
        )
        if policy == calibration.policy:
            return plan
        # What it is expected to cost was measured under another policy; what it does cost is measured next.
        provenance = dataclasses.replace(plan.provenance, source=calibration.digest(), expected_kl=None)
        return dataclasses.replace(plan, provenance=provenance)

    def _named(self, name: str, policy: Policy) -> str:
        parts = [name]
        if len(self.settings.evictions) > 1:
            parts.append(policy.eviction)
        if policy.scorer != self.settings.scorers[0]:
            parts.append(policy.scorer)
        return ", ".join(parts)

    # The result

    def _curve(self, best: str, calibration: Calibration | None) -> tuple[tuple[int, float], ...]:
        """What other limits would cost, on the held-out prompts: plans solved from the last calibration, served as the
        best one is."""
        kv_bytes, policy = self.tried.kv_bytes(best), self.tried.plan(best).policy
        points = {kv_bytes: self.tried.kl(best)}
        if calibration is None:
            return tuple(points.items())
        plans: dict[int, Plan] = {}
        for limit in (int(factor * kv_bytes) for factor in _LADDER):
            if limit >= self._bytes_of_all():
                points[self._bytes_of_all()] = 0.0
                continue
            try:
                plans[limit] = self._solved(calibration, limit, policy)
            except BudgetError:  # less than one slot a layer: there is no such limit
                continue
        if plans:
            kl = self.held_out.measure(list(plans.values()), self.compared_on).kl.mean(0)
            points |= dict(zip(plans, kl.tolist(), strict=True))
        return tuple(sorted(points.items()))

    def _result(self, best: str, curve: tuple[tuple[int, float], ...], advice: tuple[str, ...]) -> Fit:
        report = FitReport(
            limit=self.settings.kv_bytes,
            bound=self.settings.kl,
            full_bytes=self._bytes_of_full(self.context),
            context=self.context,
            batch_size=self.settings.batch_size,
            measured=self.solved_from,
            held_out=self.compared_on,
            curve=curve,
            advice=advice,
            left_out=tuple(self.left_out),
        )
        return Fit(self.tried.plan(best), report, self.tried.candidates(best))

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
