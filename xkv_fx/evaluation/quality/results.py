"""What an evaluation found: means with paired intervals, as data, as tables, and the smallest plan that is enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xkv_fx.evaluation.quality.candidates import UNIFORM, Candidate
from xkv_fx.planning.measure.bootstrap import Estimate, difference_of_means
from xkv_fx.policy import Policy

FULL = "full"
CONTINUATION_TASK = "continuation"
# A task that the full cache itself does worse at says nothing about smaller ones.
SAYS_NOTHING = 0.1
FORMAT, VERSION = "xkv_fx.evaluation", 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One plan on one task in one form.

    Attributes:
        name, size: of the plan, or of a quantized cache, which is a size of its own.
        policy: the plan's; None for a quantized cache.
        task, form: what was asked, and how.
        kv_bytes: that keys and values really took, the most over examples.
        values: of each example, by the name of the metric: `score`, or `kl`, `nll_change` and `agreement`.
        texts: what was answered.
    """

    name: str
    size: str
    policy: Policy | None
    task: str
    form: str
    kv_bytes: int
    values: Mapping[str, tuple[float, ...]]
    texts: tuple[str, ...]

    @property
    def metric(self) -> str:
        """The name of the metric that plans are compared by."""
        return "kl" if self.task == CONTINUATION_TASK else "score"

    @property
    def main(self) -> NDArray[np.float64]:
        """Its values, `[examples]`."""
        return np.array(self.values[self.metric], dtype=np.float64)

    @property
    def mean(self) -> float:
        return float(self.main.mean())


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All rows of a run.

    Attributes:
        model: fingerprint.
        dtype: of the cache.
        settings: what decided the examples.
        plans: that were compared, the full cache first.
        rows: one for each plan, task and form.
        full_bytes: of a full cache of the prompts' length, which shares are of.
        not_installed: quantized caches that were left out, with what to install.
    """

    model: str
    dtype: str
    settings: Mapping[str, Any]
    plans: tuple[Candidate, ...]
    rows: tuple[Row, ...]
    full_bytes: int
    not_installed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def full(self, row: Row) -> Row:
        """The full cache's row on the same examples."""
        return next(other for other in self.rows if other.name == FULL and _same(other, row))

    def uniform(self, row: Row) -> Row | None:
        """The uniform plan's of equal bytes and the same policy."""
        alike = (
            other
            for other in self.rows
            if _same(other, row) and (other.name, other.size, other.policy) == (UNIFORM, row.size, row.policy)
        )
        return next(alike, None)

    def says_nothing(self, row: Row) -> bool:
        """Whether the full cache is so poor at a task that it tells nothing about smaller ones."""
        return row.task != CONTINUATION_TASK and self.full(row).mean < SAYS_NOTHING

    def against(self, row: Row, other: Row | None) -> Estimate | None:
        """The paired difference of the means; of a row to itself none."""
        if other is None or other is row:
            return None
        return difference_of_means(row.main, other.main)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "dtype": self.dtype,
            "settings": {name: list(v) if isinstance(v, tuple) else v for name, v in self.settings.items()},
            "full_bytes": self.full_bytes,
            "plans": [
                {
                    "name": plan.name,
                    "size": plan.size,
                    "capacities": list(plan.budgets.capacities),
                    "policy": plan.policy.to_dict(),
                    "provenance": plan.budgets.provenance.to_dict(),
                }
                for plan in self.plans
            ],
            "rows": [self._as_dict(row) for row in self.rows],
            "not_installed": dict(self.not_installed),
        }

    def _as_dict(self, row: Row) -> dict[str, Any]:
        to_full, to_uniform = self.against(row, self.full(row)), self.against(row, self.uniform(row))
        return {
            "name": row.name,
            "size": row.size,
            "policy": None if row.policy is None else row.policy.to_dict(),
            "task": row.task,
            "form": row.form,
            "kv_bytes": row.kv_bytes,
            "means": {name: float(np.mean(each)) for name, each in row.values.items()},
            "says_nothing": self.says_nothing(row),
            "against_full": None if to_full is None else dataclasses.asdict(to_full),
            "against_uniform": None if to_uniform is None else dataclasses.asdict(to_uniform),
            "values": {name: list(each) for name, each in row.values.items()},
            "texts": list(row.texts),
        }

    def names(self) -> tuple[str, ...]:
        """The plans' names, told apart by their policies where needed."""
        return tuple(dict.fromkeys(self.name_of(row) for row in self.rows))

    def name_of(self, row: Row) -> str:
        """A plan's name, with its scorer where plans of one name have several."""
        policies = {other.policy for other in self.rows if other.name == row.name}
        if row.policy is None or len(policies) == 1:
            return row.name
        return f"{row.name}, {row.policy.scorer}"

    def as_markdown(self) -> str:
        """A table for each task and form: a row a plan, a column a size."""
        parts = []
        for task, form in dict.fromkeys((row.task, row.form) for row in self.rows):
            rows = [row for row in self.rows if (row.task, row.form) == (task, form)]
            parts += self._table(task, form, rows)
        parts += [f"{name}: not installed ({how})" for name, how in self.not_installed.items()]
        return "\n".join(parts)

    def _table(self, task: str, form: str, rows: Sequence[Row]) -> list[str]:
        full = self.full(rows[0])
        count = len(full.main)
        if task == CONTINUATION_TASK:
            title = f"**{task}**, {count} texts: mean KL to the full cache (change of NLL, top-1 agreement)"
        else:
            asked = "question inside the prompt" if form == "inside" else "asked in a second turn"
            title = f"**{task}**, {asked}, {count} examples: the full cache finds {full.mean:.1%} of the answers"
        lines = [title, ""]
        if self.says_nothing(full):
            lines += ["The full cache itself finds next to nothing, so that this table says nothing about plans.", ""]
        sizes = [size for size in dict.fromkeys(row.size for row in rows) if size != FULL]
        names = [name for name in dict.fromkeys(self.name_of(row) for row in rows) if name != FULL]
        found = {(self.name_of(row), row.size): row for row in rows}
        lines += ["| plan | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
        for name in names:
            cells = [self._cell(found.get((name, size))) for size in sizes]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return [*lines, ""]

    def _cell(self, row: Row | None) -> str:
        if row is None:
            return ""
        if row.task == CONTINUATION_TASK:
            change, agree = np.mean(row.values["nll_change"]), np.mean(row.values["agreement"])
            text = f"{row.mean:.4f} ({change:+.3f}, {agree:.1%})"
            pattern = "{:+.4f} [{:+.4f}, {:+.4f}]"
            other = self.against(row, self.uniform(row))
        else:
            text, pattern = f"{row.mean:.1%}", "{:+.1%} [{:+.1%}, {:+.1%}]"
            other = self.against(row, self.full(row))
        if other is not None:
            text += f"; {pattern.format(other.value, other.low, other.high)}"
        return text


def smallest_sizes(
    evaluation: Evaluation, tasks: Iterable[str], within: float = 0.01
) -> dict[str, dict[str, str | None]]:
    """For each form and plan's name the smallest size at which every task's mean is within so much of the full cache's,
    and at every larger size too; None where even the largest is not enough.

    Tasks that the full cache is too poor at are left out, since they would hold trivially.

    Args:
        tasks: names.
        within: share of the answers; 0.01 is a point.
    """
    asked = set(tasks)
    found: dict[str, dict[str, str | None]] = {}
    rows = [row for row in evaluation.rows if row.task in asked and not evaluation.says_nothing(row)]
    for form in dict.fromkeys(row.form for row in rows):
        plans = [row for row in rows if row.form == form and row.name != FULL and row.policy is not None]
        for name in dict.fromkeys(evaluation.name_of(row) for row in plans):
            mine = [row for row in plans if evaluation.name_of(row) == name]
            smallest = None
            for size in sorted({row.size for row in mine}, key=lambda size: -_bytes(mine, size)):
                if any(row.mean < evaluation.full(row).mean - within - 1e-9 for row in mine if row.size == size):
                    break
                smallest = size
            found.setdefault(form, {})[name] = smallest
    return found


def _bytes(rows: Sequence[Row], size: str) -> int:
    return max(row.kv_bytes for row in rows if row.size == size)


def _same(one: Row, other: Row) -> bool:
    return (one.task, one.form) == (other.task, other.form)
