"""Plans beside one another at equal bytes, on held-out text: the tables of docs/benchmarks.md.

    python -m xkv_fx.evaluation.quality.allocations --out out/allocations

Calibrates on stretches of one kind of text, once for capacities alone and once for capacities and formats together,
solves each share of a full cache's bytes with each allocator, and measures KL to the full cache on held-out stretches
of that kind and of another, beside uniform capacities and one format for all layers. Writes `allocations.json` and
`allocations.md`, and what it measured; an interrupted run goes on where it was, and another plan or share adds to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from xkv_fx.evaluation.dtypes import dtype_of
from xkv_fx.evaluation.quality.candidates import (
    CALIBRATED,
    JOINT,
    UNIFORM,
    Candidate,
    bits_per_element,
    by_head,
    candidates_of_fractions,
    formats_of,
    is_of_one_format,
)
from xkv_fx.evaluation.quality.held_out import measure_held_out
from xkv_fx.evaluation.quality.sources import CALIBRATED_ON, Wanted, reporter, sources_for, split_prompts
from xkv_fx.files import write_json
from xkv_fx.hf.capture import capture
from xkv_fx.hf.models import load_model
from xkv_fx.layers import LayerSpec, with_itemsize
from xkv_fx.planning.data.load_measured import load_measured
from xkv_fx.planning.measure.bootstrap import Estimate, ratio_of_means
from xkv_fx.planning.measure.held_out import HeldOutResult, identity_of
from xkv_fx.planning.measure.verify import VERIFY_CONTINUATION, summary
from xkv_fx.planning.solve.constraints import full_bytes

FRACTIONS = (0.06, 0.125, 0.25, 0.384)
ALLOCATORS = (CALIBRATED, JOINT)
FORMATS = ("model", "int8", "int4")
EVERYTHING = "all held-out prompts"

console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Line:
    """One plan under one eviction on prompts of one kind.

    Attributes:
        eviction, kind, size, name: which plan, and which prompts.
        plan: all of it that decides what it answers.
        share: of the bytes of a full cache, that it takes.
        bits: that an element of a kept key or value takes, scales and zeros counted.
        kl: KL(full || plan) of each prompt, nats.
        agreement: of each prompt, the share of tokens for which both prefer the same next one.
    """

    eviction: str
    kind: str
    size: str
    name: str
    plan: dict[str, Any]
    share: float
    bits: float
    kl: tuple[float, ...]
    agreement: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        found = summary(self.kl)
        return {**dataclasses.asdict(self), **{f"{name}_kl": value for name, value in found.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    dtype = dtype_of(options.bytes_of)
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(options.model)
    tokens = options.context + options.continuation
    calibration_prompts, held_out = split_prompts(tokenizer, options.calibrate_on, options.held_out, tokens)
    wanted = Wanted(
        tuple(options.allocators),
        tuple(options.formats),
        options.context,
        tuple(load_measured(path) for path in options.measured),
        options.out,
        tuple(options.by),
    )
    with Progress(console=console) as bars:
        captured = capture(model, decode=False)
        plans: list[Candidate] = []
        seconds: dict[str, dict[str, float]] = {}
        for eviction in options.evictions:
            sources, seconds[eviction] = sources_for(captured, eviction, calibration_prompts, wanted, bars)
            plans += candidates_of_fractions(
                captured.layers, options.context, options.fractions, sources, wanted.allocators,
                formats=formats_of(sources), dtype=dtype,
            )  # fmt: skip
        measured = measure_held_out(
            captured,
            [plan.budgets for plan in plans],
            list(itertools.chain.from_iterable(held_out.values())),
            options.continuation,
            options.out / "held_out",
            reporter(bars, "held-out prompts"),
        )
    counted = with_itemsize(captured.layers, dtype.itemsize)
    lines = lines_of(plans, held_out, measured, counted, options.context)
    results = {
        "settings": {name: plain(value) for name, value in vars(options).items()},
        "calibrated_on": CALIBRATED_ON,
        "calibration_seconds": seconds,
        "full_bytes": full_bytes(counted, options.context),
        "rows": [line.to_dict() for line in lines],
    }
    write_json(options.out / "allocations.json", results)
    text = as_tables(lines, options.bytes_of)
    (options.out / "allocations.md").write_text(text, encoding="utf-8")
    print(text)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model folder, a .gguf file or an alias")
    parser.add_argument("--out", type=Path, default=Path("out/allocations"))
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt before its continuation")
    parser.add_argument(
        "--continuation", type=int, default=VERIFY_CONTINUATION, help="tokens that are measured behind each prompt"
    )
    parser.add_argument("--calibrate-on", type=int, default=12, help="prompts to calibrate and profile on")
    parser.add_argument("--held-out", type=int, default=20, help="held-out prompts of each kind of text")
    parser.add_argument("--evictions", nargs="+", default=["append", "ring"])
    parser.add_argument("--fractions", nargs="+", type=float, default=list(FRACTIONS), help="shares of a full cache")
    parser.add_argument("--allocators", nargs="+", default=list(ALLOCATORS), help="joint, calibrated, or of a profile")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="what is calibrated for joint")
    parser.add_argument("--by", nargs="+", default=["layer"], choices=["layer", "head"], help="what gets capacities")
    parser.add_argument(
        "--measured", nargs="*", type=Path, default=[], help="profiles and calibrations to use instead of measuring"
    )
    parser.add_argument("--bytes-of", default="bfloat16", help="the dtype that bytes are counted in")
    return parser.parse_args(arguments)


def plain(value: Any) -> Any:
    """An option as JSON's types."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def lines_of(
    plans: Sequence[Candidate],
    prompts: Mapping[str, Sequence[Tensor]],
    measured: HeldOutResult,
    layers: Sequence[LayerSpec],
    context: int,
    apart: bool = True,
) -> tuple[Line, ...]:
    """What was measured of each plan on each kind of prompt; on all kinds together where they are not kept `apart`."""
    kinds = [kind for kind, of_kind in prompts.items() for _ in of_kind] if apart else [EVERYTHING] * len(measured.kl)
    full = full_bytes(layers, context)
    names = _distinct_names(plans)
    found = []
    for kind in dict.fromkeys(kinds):
        rows = [row for row, of_row in enumerate(kinds) if of_row == kind]
        for at, plan in enumerate(plans):
            found.append(
                Line(
                    plan.policy.eviction,
                    kind,
                    plan.size,
                    names[at],
                    identity_of(plan.budgets),
                    plan.budgets.kv_bytes(layers) / full,
                    bits_per_element(plan.budgets, layers),
                    tuple(measured.kl[rows, at].tolist()),
                    tuple(measured.agreement[rows, at].tolist()),
                )
            )
    return tuple(found)


def _distinct_names(plans: Sequence[Candidate]) -> list[str]:
    """The names of plans, with the scorer behind them where another plan of that name, size and eviction was first."""
    first: dict[tuple[str, str, str], str] = {}
    names = []
    for plan in plans:
        scorer = plan.policy.scorer
        of_name = first.setdefault((plan.policy.eviction, plan.size, plan.name), scorer)
        names.append(plan.name if scorer == of_name else f"{plan.name}, {scorer}")
    return names


def as_tables(lines: Sequence[Line], dtype: str) -> str:
    """Markdown: for each kind of eviction a table over all held-out prompts and one for each kind of text."""
    parts = []
    for eviction in dict.fromkeys(line.eviction for line in lines):
        mine = [line for line in lines if line.eviction == eviction]
        parts += _table(f'`eviction="{eviction}"`, {EVERYTHING}', mine, dtype)
        for kind in dict.fromkeys(line.kind for line in mine):
            held = "other stretches were calibrated on" if kind == CALIBRATED_ON else "another kind of text"
            of_kind = [line for line in mine if line.kind == kind]
            parts += _table(f'`eviction="{eviction}"`, {kind} ({held})', of_kind, dtype)
    return "\n".join(parts)


def _table(title: str, lines: Sequence[Line], dtype: str) -> list[str]:
    """Lines of a table with a row for each plan and a column for each share; rows of one plan and of several kinds of
    text are taken together."""
    sizes = list(dict.fromkeys(line.size for line in lines))
    names = list(dict.fromkeys(line.name for line in lines))
    kl = {(size, name): together(lines, size, name) for size in sizes for name in names}
    written = [
        f"{title}, {len(kl[sizes[0], UNIFORM])} prompts: mean KL (median, 95th percentile), behind its change against "
        f"uniform with the paired 95 % interval; shares are of the bytes of a full {dtype} cache",
        "",
        f"| plan | {' | '.join(sizes)} |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for name in [UNIFORM, *(name for name in names if name != UNIFORM)]:
        cells = []
        for size in sizes:
            change = "" if name == UNIFORM else f"{_change(kl[size, name], kl[size, UNIFORM])} "
            cells.append(f"{change}{_cell(kl[size, name])}" if len(kl[size, name]) else "")
        written.append(f"| {name} | {' | '.join(cells)} |")
    if JOINT in names:
        rivals = {size: (CALIBRATED, best_single_format(lines, size)) for size in sizes}
        cells = [_against(kl, size, rivals[size][0]) for size in sizes]
        written.append(f"| **{JOINT} against capacities alone** | {' | '.join(cells)} |")
        cells = [f"{_against(kl, size, rivals[size][1])} {rivals[size][1] or ''}" for size in sizes]
        written.append(f"| **{JOINT} against the best single format** | {' | '.join(cells)} |")
    for name in (CALIBRATED, JOINT):
        if by_head(name) in names and name in names:
            cells = [_change(kl[size, by_head(name)], kl[size, name]) for size in sizes]
            written.append(f"| **{by_head(name)} against {name}** | {' | '.join(cells)} |")
    return [*written, ""]


def best_single_format(lines: Sequence[Line], size: str) -> str | None:
    """The name of the plan that stores all layers alike and strays least on these prompts; None if there is none."""
    names = {line.name for line in lines if line.size == size and is_of_one_format(line.name)}
    return min(names, key=lambda name: float(together(lines, size, name).mean()), default=None)


def together(lines: Sequence[Line], size: str, name: str) -> NDArray[np.float64]:
    """KL of one plan on prompts of all kinds; none where there is no such plan."""
    found = [line.kl for line in lines if (line.size, line.name) == (size, name)]
    return np.concatenate([np.zeros(0), *map(np.array, found)])


def _against(kl: dict[tuple[str, str], NDArray[np.float64]], size: str, rival: str | None) -> str:
    if rival is None or not len(kl.get((size, rival), ())):
        return ""
    return _change(kl[size, JOINT], kl[size, rival])


def _change(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> str:
    ratio: Estimate = ratio_of_means(ours, theirs)
    return f"**{ratio.value - 1:+.0%}** [{ratio.low - 1:+.0%}, {ratio.high - 1:+.0%}]"


def _cell(kl: NDArray[np.float64]) -> str:
    found = summary(kl.tolist())
    return f"{nats(found['mean'])} ({nats(found['median'])}, {nats(found['p95'])})"


def nats(value: float) -> str:
    """A divergence, with more digits where it is small."""
    return f"{value:.3f}" if value >= 0.1 else f"{value:.4f}" if value >= 0.01 else f"{value:.5f}"


if __name__ == "__main__":
    main()
