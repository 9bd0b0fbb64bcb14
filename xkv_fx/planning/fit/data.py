"""What `xkv_fx.fit` found: the plan, what it was compared with, and what the limit costs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from xkv_fx.budgets import Plan
from xkv_fx.formats import is_by_head, pair_name
from xkv_fx.planning.measure.bootstrap import Estimate
from xkv_fx.planning.measure.verify import summary


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan that was measured on the held-out prompts.

    Attributes:
        name: how it was made, such as `"capacities and formats by layer"`.
        budgets: the plan.
        kv_bytes: that its K/V buffers take, room for generated tokens included.
        kl: KL(full || plan) of each held-out prompt, nats, the mean over its continuation.
        ratio: mean KL of the plan that was chosen over the mean of `kl`, with its paired 95 % interval.
    """

    name: str
    budgets: Plan
    kv_bytes: int
    kl: tuple[float, ...]
    ratio: Estimate

    @property
    def mean_kl(self) -> float:
        return float(np.mean(self.kl))

    @property
    def stored(self) -> str:
        """The formats of its layers, and how many layers have each; of those stored by KV head, their heads count."""
        each = (formats if is_by_head(formats) else (formats,) for formats in self.budgets.layer_formats)
        counts = Counter(pair_name(pair) for formats in each for pair in formats)  # type: ignore[arg-type]
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {name}" for name, n in counts.items())

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "policy": self.budgets.policy.to_dict(),
            "stored": self.stored,
            "total_tokens": self.budgets.total_tokens,
            "kv_bytes": self.kv_bytes,
            **{f"{name}_kl": value for name, value in summary(self.kl).items()},
            "chosen_over_this": [self.ratio.value, self.ratio.low, self.ratio.high],
        }


@dataclasses.dataclass(frozen=True)
class FitReport:
    """What the limit means and costs.

    Attributes:
        limit: in bytes; None where a bound on the KL was given.
        bound: on the mean KL, nats; None where a limit in bytes was given.
        full_bytes: of a cache that holds all `context` tokens in the model's dtype.
        context: tokens of prompt that the plan is for.
        batch_size: rows.
        measured: prompts that plans were solved from.
        held_out: prompts that plans were compared on.
        curve: bytes and held-out mean KL of plans made as the chosen one was, ascending.
        advice: what a user should know of the limit, a sentence each.
        left_out: what was not tried, and why, a sentence each.
    """

    limit: int | None
    bound: float | None
    full_bytes: int
    context: int
    batch_size: int
    measured: int
    held_out: int
    curve: tuple[tuple[int, float], ...]
    advice: tuple[str, ...]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "curve": [list(point) for point in self.curve]}


@dataclasses.dataclass(frozen=True)
class Fit:
    """The plan that was best on held-out prompts, and how it was found.

    Attributes:
        budgets: the plan; its provenance holds what was measured of it.
        report: what the limit means and costs.
        candidates: all plans that were compared, the best first.
    """

    budgets: Plan
    report: FitReport
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        """The candidate whose plan `budgets` is."""
        return self.candidates[0]

    def with_plans(self, of: Callable[[Plan], Plan]) -> Fit:
        """The same with every plan replaced by what `of` makes of it."""
        candidates = tuple(dataclasses.replace(one, budgets=of(one.budgets)) for one in self.candidates)
        return dataclasses.replace(self, budgets=of(self.budgets), candidates=candidates)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.report.to_dict(),
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "budgets": self.budgets.to_dict(),
        }

    def __str__(self) -> str:
        best = self.chosen
        lines = [f"{best.name}: {best.kv_bytes:,} bytes, held-out KL {best.mean_kl:.4f}"]
        for other in self.candidates[1:]:
            change = other.ratio
            lines.append(
                f"  {change.value - 1:+.0%} ({change.low - 1:+.0%} to {change.high - 1:+.0%}) against {other.name}, "
                f"{other.kv_bytes:,} bytes, KL {other.mean_kl:.4f}"
            )
        return "\n".join((*lines, *self.report.advice, *self.report.left_out))
