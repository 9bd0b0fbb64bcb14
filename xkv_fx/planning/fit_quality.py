"""The smallest plan whose held-out divergence stays under a bound."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from xkv_fx.budgets import Plan
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BudgetError, ModelMismatchError
from xkv_fx.formats import pair_name
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.measure.team import Progress
from xkv_fx.planning.measure.verify import VERIFY_CONTINUATION, divergence_of_plans, held_out_summary
from xkv_fx.planning.solve.constraints import full_bytes
from xkv_fx.planning.solve.plan import solve_plan

# How many plans are tried in one round, in one pass over the prompts; each round leaves one gap between two of them.
_TRIED = 7


def smallest_plan(
    captured: CapturedModel,
    calibration: Calibration,
    prompts: Sequence[Tensor],
    kl: float,
    context: int | None = None,
    multiple: int = 16,
    resolution: float = 0.01,
    continuation: int = VERIFY_CONTINUATION,
    progress: Progress | None = None,
) -> Plan:
    """The plan of the fewest tokens, or bytes where formats or heads were measured, whose mean held-out KL is at most
    `kl`; see `xkv_fx.fit_quality`.

    Totals are narrowed down by rounds of several plans at once, to within `resolution` of the full cache.
    """
    if isinstance(kl, bool) or not isinstance(kl, numbers.Real) or not (kl > 0 and math.isfinite(kl)):
        raise BudgetError(f"kl must be a number above 0, in nats; got {kl!r}")
    if not 0 < resolution < 1:
        raise BudgetError(f"resolution must be a share of the full cache, between 0 and 1; got {resolution!r}")
    if calibration.model != captured.fingerprint:
        raise ModelMismatchError(
            f"the calibration was made for the model {calibration.model!r}, not for {captured.fingerprint!r}"
        )
    context = calibration.context_default if context is None else context
    totals_of = _Totals.of(calibration, context)
    gap = max(1, math.floor(resolution * totals_of.full))
    rounds = max(1, math.ceil(math.log(max(2, totals_of.most / gap), _TRIED + 1)))
    steps = rounds * len(prompts)
    low, high = 0, totals_of.most  # `low` is known not to be enough
    found: tuple[Plan, list[float]] | None = None
    for turn in range(rounds):
        totals = sorted({low + (high - low) * step // (_TRIED + 1) for step in range(1, _TRIED + 1)} | {high})
        totals = [total for total in totals if total >= totals_of.least]
        plans = [
            solve_plan(calibration, context=context, multiple=multiple, **{totals_of.constraint: total})
            for total in totals
        ]

        def report(done: int, total: int, before: int = turn * len(prompts)) -> None:
            if progress is not None:
                progress(before + done, steps)

        measured = divergence_of_plans(captured, plans, prompts, continuation, report).mean(2)
        enough = np.flatnonzero(measured.mean(0) <= kl)
        if not len(enough):
            break
        first = int(enough[0])
        found = plans[first], measured[:, first].tolist()
        low, high = (totals[first - 1] if first else low), totals[first]
    if found is None:
        stored = (
            "" if None in calibration.pairs else f", and {', '.join(map(pair_name, calibration.pairs))} is not exact"
        )
        raise BudgetError(
            f"even with room for all {context} tokens of the prompt the held-out KL is above {kl}: generated tokens "
            f"push out others under eviction={calibration.policy.eviction!r}{stored}; ask for a larger kl"
        )
    plan, divergences = found
    provenance = dataclasses.replace(
        plan.provenance, constraint={"kl": float(kl)}, held_out=held_out_summary(divergences, continuation)
    )
    return dataclasses.replace(plan, provenance=provenance)


@dataclasses.dataclass(frozen=True)
class _Totals:
    """The kind of total that the search narrows down.

    Attributes:
        constraint: the argument of `solve` that sets this total.
        least: one slot a layer.
        most: all that the layers can hold.
        full: what `resolution` is a share of.
    """

    constraint: str
    least: int
    most: int
    full: int

    @classmethod
    def of(cls, calibration: Calibration, context: int) -> _Totals:
        """Tokens; bytes where formats or heads were measured, since tokens then differ in size or in what they are."""
        layers = calibration.layers
        held = [spec.effective_capacity(context) for spec in layers]
        if calibration.formats is None and calibration.heads is None:
            return cls("total_tokens", len(layers), sum(held), sum(held))
        sizes = [[spec.slot_bytes(formats=pair) for pair in calibration.pairs] for spec in layers]
        return cls(
            "kv_bytes",
            sum(map(min, sizes)),
            sum(max(of) * c for of, c in zip(sizes, held, strict=True)),
            full_bytes(layers, context),
        )
