"""What the bench measured: as JSON, as a table, as a picture."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Sequence
from typing import Any, Self

from rich.table import Table

from xkv_fx.evaluation.pictures import new_figure


@dataclasses.dataclass(frozen=True)
class Run:
    """One contestant's figures. None is what was not measured.

    Attributes:
        rows: of its batch.
        context: tokens that every row has seen when decoding begins.
        filled: the caches were filled directly with random numbers, instead of by a prompt.
        prefill_s: a prompt of `context` tokens a row.
        ready_s: everything up to the first token: capture, compilation, and the prompt or the filling.
        decode_p50_ms, decode_p90_ms: one token for every row.
        tokens_per_second: of all rows, by the median.
        kv_bytes: K/V held.
        peak_bytes: weights, K/V and the most that a step held besides.
        floor_ms: reading the weights and the K/V once, by the read speed measured in the same run.
        skipped: why there are no figures.
    """

    name: str
    rows: int
    context: int
    filled: bool = False
    prefill_s: float | None = None
    ready_s: float | None = None
    decode_p50_ms: float | None = None
    decode_p90_ms: float | None = None
    tokens_per_second: float | None = None
    kv_bytes: int | None = None
    peak_bytes: int | None = None
    floor_ms: float | None = None
    skipped: str | None = None

    @classmethod
    def of_steps(cls, name: str, rows: int, context: int, seconds: Sequence[float], **figures: Any) -> Self:
        """A run whose decode steps took so long, with further `figures` by the names of the attributes."""
        times = sorted(seconds)
        middle = statistics.median(times)
        return cls(
            name,
            rows,
            context,
            decode_p50_ms=middle * 1e3,
            decode_p90_ms=times[min(len(times) - 1, int(0.9 * len(times)))] * 1e3,
            tokens_per_second=rows / middle,
            **figures,
        )


@dataclasses.dataclass(frozen=True)
class Bench:
    """All runs, and what they were measured on."""

    runs: tuple[Run, ...]
    machine: dict[str, Any]

    def run(self, name: str) -> Run | None:
        """The contestant of that name, if it was measured."""
        return next((run for run in self.runs if run.name == name and run.skipped is None), None)

    @property
    def ratios(self) -> dict[str, dict[str, float]]:
        """What compares the runs; of one run of the bench only.

        `tokens_per_second` over that of transformers' dynamic cache; `step_to_floor`; `budgets_to_plain`, the step of
        our budgets over one of a plain cache of equal capacity, ours (`ours-plain`) and transformers' static cache,
        compiled (`static-plain`); `tokens_per_second_to_ours_full`, that of our other caches over that of our full one.
        """
        measured = [run for run in self.runs if run.skipped is None]
        base, ours = self.run("dynamic"), self.run("ours")
        plain = [run for run in measured if run.name.endswith("-plain")]
        ratios = {
            "tokens_per_second_to_dynamic": {
                run.name: run.tokens_per_second / base.tokens_per_second
                for run in measured
                if base is not None and base.tokens_per_second and run.tokens_per_second
            },
            "step_to_floor": {
                run.name: run.decode_p50_ms / run.floor_ms for run in measured if run.decode_p50_ms and run.floor_ms
            },
        }
        if ours is not None and ours.decode_p50_ms and plain:
            ratios["budgets_to_plain"] = {
                run.name: ours.decode_p50_ms / run.decode_p50_ms for run in plain if run.decode_p50_ms
            }
        full = self.run("ours-full")
        if full is not None and full.tokens_per_second:
            ratios["tokens_per_second_to_ours_full"] = {
                run.name: run.tokens_per_second / full.tokens_per_second
                for run in measured
                if run.name.startswith("ours") and run is not full and run.tokens_per_second
            }
        return ratios

    def to_dict(self) -> dict[str, Any]:
        """With the keys `runs`, `ratios` and `machine`; plain data."""
        return {
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "ratios": self.ratios,
            "machine": self.machine,
        }

    def table(self) -> Table:
        """A line for each run."""
        columns = (
            "",
            "rows",
            "prefill s",
            "p50 ms",
            "p90 ms",
            "tokens/s",
            "to dynamic",
            "KV MB",
            "peak MB",
            "floor ms",
        )
        table = Table(*columns, "to floor")
        ratios = self.ratios
        for run in self.runs:
            if run.skipped is not None:
                table.add_row(run.name, str(run.rows), run.skipped)
                continue
            table.add_row(
                run.name,
                str(run.rows),
                "filled" if run.filled else _number(run.prefill_s, 2),
                _number(run.decode_p50_ms, 1),
                _number(run.decode_p90_ms, 1),
                _number(run.tokens_per_second, 1),
                _number(ratios["tokens_per_second_to_dynamic"].get(run.name), 2),
                _number(run.kv_bytes, 1, 1e6),
                _number(run.peak_bytes, 1, 1e6),
                _number(run.floor_ms, 1),
                _number(ratios["step_to_floor"].get(run.name), 2),
            )
        return table

    def notes(self) -> list[str]:
        """What the table does not say by itself."""
        machine = self.machine
        notes = [
            f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, transformers "
            f"{machine['transformers']}; reads {machine['read_bytes_per_second'] / 1e9:.1f} GB/s, and the floor is "
            f"{machine['weight_bytes'] / 1e6:.1f} MB of weights and the K/V at that speed"
        ]
        if any(run.filled for run in self.runs):
            notes.append("filled: keys and values are random numbers, not of a prompt; decoding takes the same time")
        for name, ratio in self.ratios.get("budgets_to_plain", {}).items():
            notes.append(f"a step of our budgets takes {ratio:.2f} times one of {name}, which holds as many")
        full = self.run("ours-full")
        for name, ratio in self.ratios.get("tokens_per_second_to_ours_full", {}).items():
            run = self.run(name)
            if full is None or run is None:
                continue
            step = f", and a step takes {1 / ratio:.2f} times its" if run.rows == full.rows else ""
            notes.append(
                f"{name}, {run.rows} rows, decodes {ratio:.2f} times the tokens/s of our full cache of {full.rows} rows"
                f"{step}"
            )
        return notes

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write a picture: a bar for each contestant's step, and its floor.

        Args:
            path: where to; the ending decides the format (.png, .svg, .pdf).

        Raises:
            XkvError: matplotlib is missing.
        """
        runs = [run for run in reversed(self.runs) if run.decode_p50_ms is not None]
        labels = [f"{run.name} ({run.rows} rows)" for run in runs]
        times = [(run.decode_p50_ms or 0.0) / run.rows for run in runs]
        figure = new_figure(8, 1.2 + 0.45 * len(runs))
        axes = figure.add_subplot()
        bars = axes.barh(labels, times, color="tab:blue", label="median step")
        floors = [(run.floor_ms or 0.0) / run.rows for run in runs]
        axes.barh(labels, floors, height=0.25, color="black", label="reading weights and K/V once")
        axes.bar_label(bars, labels=[f" {run.tokens_per_second:.0f} tokens/s" for run in runs])
        axes.margins(x=0.2)
        axes.set(xlabel="milliseconds a token", title=f"Decode on {self.machine['device']}")
        axes.legend()
        figure.savefig(path, dpi=120)


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"
