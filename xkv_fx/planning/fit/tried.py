"""The plans that a fit has tried: what they cost on the held-out prompts, and which is the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from xkv_fx.budgets import Plan
from xkv_fx.planning.fit.data import Candidate
from xkv_fx.planning.fit.settings import FitSettings
from xkv_fx.planning.measure.bootstrap import ratio_of_means
from xkv_fx.planning.measure.held_out import HeldOut
from xkv_fx.planning.measure.verify import held_out_summary

Found = Callable[[Plan, str], None]
"""Called with each plan that is better than the one before, and with how it was made."""


class Tried:
    """Plans by the names that say how they were made.

    Args:
        settings: what was asked for.
        held_out: the prompts that plans are compared on.
        context: tokens of prompt that they are for.
        found: called with each plan that is better than those before.

    Attributes:
        best: the name of the best plan so far; None while none keeps the bound.
    """

    def __init__(self, settings: FitSettings, held_out: HeldOut, context: int, found: Found | None) -> None:
        self.settings, self.held_out, self.context = settings, held_out, context
        self.best: str | None = None
        self._found = found
        self._plans: dict[str, Plan] = {}
        self._kl: dict[str, NDArray[np.float64]] = {}

    def add(self, plans: Mapping[str, Plan], prompts: int | None = None) -> None:
        """Measure plans on the first so many held-out prompts, all by default, and hand out the best so far."""
        kl = self.held_out.measure(list(plans.values()), prompts).kl.T
        self.add_measured(plans, dict(zip(plans, kl, strict=True)))

    def add_measured(self, plans: Mapping[str, Plan], kl: Mapping[str, NDArray[np.float64]]) -> None:
        """As `add`, where the KL of each held-out prompt is known."""
        self._plans |= plans
        self._kl |= kl
        best = min(self._allowed(), key=self._rank, default=None)
        if best is not None and best != self.best:
            self.best = best
            if self._found is not None:
                self._found(self.plan(best), best)

    def plan(self, name: str) -> Plan:
        """The plan of that name, with what was measured of it in its provenance."""
        plan, settings = self._plans[name], self.settings
        provenance = dataclasses.replace(
            plan.provenance,
            model=self.held_out.captured.fingerprint,
            allocator=plan.provenance.allocator or "uniform",
            constraint=plan.provenance.constraint or settings.constraint,
            context=self.context,
            held_out=held_out_summary(self._kl[name].tolist(), settings.continuation),
        )
        return dataclasses.replace(plan, provenance=provenance)

    def kl(self, name: str) -> float:
        """The mean KL of a plan, nats."""
        return float(self._kl[name].mean())

    def kv_bytes(self, name: str) -> int:
        """Bytes that a plan allocates, room for generated tokens included."""
        settings, layers = self.settings, self.held_out.captured.layers
        return self._plans[name].kv_bytes(layers, settings.batch_size, max_new_tokens=settings.max_new_tokens)

    def candidates(self, best: str) -> tuple[Candidate, ...]:
        """All plans, the best first; those that break the bound on the KL come last."""
        allowed = sorted(self._allowed(), key=self._rank)
        others = sorted((name for name in self._kl if name not in allowed), key=self.kl)
        return tuple(
            Candidate(
                name,
                self._plans[name],
                self.kv_bytes(name),
                tuple(self._kl[name].tolist()),
                ratio_of_means(self._kl[best], self._kl[name]),
            )
            for name in (*allowed, *others)
        )

    def _allowed(self) -> list[str]:
        bound = self.settings.kl
        return [name for name in self._kl if bound is None or self.kl(name) <= bound]

    def _rank(self, name: str) -> float:
        """Lower is better: the KL under a limit in bytes, the bytes under a bound on the KL."""
        return self.kl(name) if self.settings.kl is None else self.kv_bytes(name)
