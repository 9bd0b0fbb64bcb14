"""Every allocator against uniform at equal bytes, on held-out text: a table of docs/benchmarks.md.

    python -m xkv_fx.evaluation.quality.allocations --out out/allocations

Calibrates and profiles on stretches of one kind of text, solves each fraction with each allocator, and measures KL to
the full cache on held-out stretches of that kind and of another. Writes `allocations.json` and `allocations.md`, and
each eviction's profile and calibration; what was calibrated is kept, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import xkv_fx
from xkv_fx.evaluation.texts import KINDS, cut_prompts
from xkv_fx.files import write_json
from xkv_fx.hf.models import load_model
from xkv_fx.planning.measure.bootstrap import ratio_of_means
from xkv_fx.planning.measure.calibrate import CALIBRATE_CONTINUATION
from xkv_fx.planning.measure.verify import VERIFY_CONTINUATION, summary

FRACTIONS = (0.06, 0.125, 0.25, 0.384)
ALLOCATORS = ("xkv", "maxmin", "pyramid", "entropy", "squeeze", "calibrated")
STATISTICS = ("preference", "similarity")
CALIBRATED_ON = "documentation"

console = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model folder, a .gguf file or an alias")
    parser.add_argument("--out", type=Path, default=Path("out/allocations"))
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt before its continuation")
    parser.add_argument(
        "--continuation", type=int, default=VERIFY_CONTINUATION, help="tokens that are measured behind each prompt"
    )
    parser.add_argument("--calibrate-on", type=int, default=12, help="prompts to calibrate and profile on")
    parser.add_argument("--held-out", type=int, default=32, help="held-out prompts of each kind of text")
    parser.add_argument("--evictions", nargs="+", default=["append", "ring"])
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(options.model)
    tokens = options.context + options.continuation
    calibration_prompts, held_out = split_prompts(tokenizer, options.calibrate_on, options.held_out, tokens)
    results: dict[str, Any] = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "calibrated_on": CALIBRATED_ON,
        "evictions": {},
    }
    for eviction in options.evictions:
        policy = xkv_fx.Policy(eviction=eviction)
        results["evictions"][eviction] = measure(model, policy, calibration_prompts, held_out, options)
        write_json(options.out / "allocations.json", results)
        (options.out / "allocations.md").write_text(as_tables(results), encoding="utf-8")
    print(as_tables(results))


def split_prompts(
    tokenizer: Any, calibrate_on: int, held_out: int, tokens: int
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Stretches to calibrate on, spread evenly among the held-out ones of their kind; and the held-out ones."""
    stretches = {
        kind: list(cut_prompts(tokenizer, text(), held_out + (calibrate_on if kind == CALIBRATED_ON else 0), tokens))
        for kind, text in KINDS.items()
    }
    own = stretches[CALIBRATED_ON]
    chosen = {round(place) for place in np.linspace(0, len(own) - 1, calibrate_on)}
    calibration = [ids for place, ids in enumerate(own) if place in chosen]
    stretches[CALIBRATED_ON] = [ids for place, ids in enumerate(own) if place not in chosen]
    return calibration, stretches


def measure(
    model: Any,
    policy: xkv_fx.Policy,
    calibration_prompts: Sequence[Tensor],
    held_out: dict[str, list[Tensor]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Everything that one kind of eviction needs: plans, and their divergences on each kind of text."""
    with Progress(console=console) as progress:
        profile = xkv_fx.profile(
            model,
            [ids[:, : options.context] for ids in calibration_prompts],
            policy=policy,
            statistics=STATISTICS,
            progress=reporter(progress, f"{policy.eviction}: profile"),
        )
        profile.save(options.out / f"profile-{policy.eviction}.safetensors")
        started = time.perf_counter()
        calibration = xkv_fx.calibrate(
            model,
            [ids[:, : options.context + CALIBRATE_CONTINUATION] for ids in calibration_prompts],
            policy=policy,
            continuation=CALIBRATE_CONTINUATION,
            progress=reporter(progress, f"{policy.eviction}: calibrate"),
            resume=options.out / "calibrated",
        )
        calibrated_in = time.perf_counter() - started
        calibration.save(options.out / f"calibration-{policy.eviction}.safetensors")
        plans = {
            (fraction, name): xkv_fx.solve(
                calibration if name == "calibrated" else profile,
                fraction=fraction,
                context=options.context,
                allocator=name,
            )
            for fraction in FRACTIONS
            for name in ALLOCATORS
        }
        rows = []
        for kind, prompts in held_out.items():
            reports = xkv_fx.verify(
                model,
                tuple(plans.values()),
                prompts,
                continuation=options.continuation,
                progress=reporter(progress, f"{policy.eviction}: {kind}"),
            )
            for (fraction, name), budgets, report in zip(plans, plans.values(), reports, strict=True):
                rows.append(
                    {
                        "kind": kind,
                        "fraction": fraction,
                        "allocator": name,
                        "capacities": list(budgets.capacities),
                        **report.to_dict(),
                        "kl": list(report.kl),
                        "uniform_kl": list(report.uniform_kl),
                    }
                )
    return {"calibration_seconds": calibrated_in, "rows": rows}


def reporter(progress: Progress, what: str) -> Any:
    """A progress callback that moves a bar of its own."""
    task = progress.add_task(what, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def as_tables(results: dict[str, Any]) -> str:
    """Markdown: for each kind of eviction one table over all held-out prompts and one for each kind of text."""
    parts = []
    for eviction, measured in results["evictions"].items():
        kinds = list(dict.fromkeys(row["kind"] for row in measured["rows"]))
        parts += _table(f'`eviction="{eviction}"`, all held-out prompts', measured["rows"])
        for kind in kinds:
            held = "other stretches were calibrated on" if kind == results["calibrated_on"] else "another kind of text"
            rows = [row for row in measured["rows"] if row["kind"] == kind]
            parts += _table(f'`eviction="{eviction}"`, {kind} ({held})', rows)
    return "\n".join(parts)


def _table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table with a row for each allocator and a column for each fraction; rows of one plan and of several
    kinds of text are taken together."""
    fractions = list(dict.fromkeys(row["fraction"] for row in rows))
    allocators = list(dict.fromkeys(row["allocator"] for row in rows))
    together = {
        (fraction, name): [row for row in rows if (row["fraction"], row["allocator"]) == (fraction, name)]
        for fraction in fractions
        for name in allocators
    }
    kl = {key: np.concatenate([row["kl"] for row in found]) for key, found in together.items()}
    even = {
        fraction: np.concatenate([row["uniform_kl"] for row in together[fraction, allocators[0]]])
        for fraction in fractions
    }
    prompts = len(even[fractions[0]])
    lines = [
        f"{title}, {prompts} prompts: mean KL (median, 95th percentile)",
        "",
        "| allocator | " + " | ".join(f"{fraction:.1%} of full" for fraction in fractions) + " |",
        "|---" * (len(fractions) + 1) + "|",
        "| uniform | " + " | ".join(_cell(even[fraction]) for fraction in fractions) + " |",
    ]
    for name in allocators:
        cells = []
        for fraction in fractions:
            ratio = ratio_of_means(kl[fraction, name], even[fraction])
            change = f"**{ratio.value - 1:+.0%}** [{ratio.low - 1:+.0%}, {ratio.high - 1:+.0%}]"
            cells.append(f"{change} {_cell(kl[fraction, name])}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _cell(kl: NDArray[np.float64]) -> str:
    found = summary(kl.tolist())
    return f"{found['mean']:.3f} ({found['median']:.3f}, {found['p95']:.3f})"


if __name__ == "__main__":
    main()
