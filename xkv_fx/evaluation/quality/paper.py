"""The paper's sentence in one table: 61.6 % less memory at comparable accuracy (XKV, arXiv 2412.05896).

    python -m xkv_fx.evaluation.quality.paper --out out/paper

At one share of a full cache's bytes: capacities and formats planned together by KV head and by layer, capacities alone,
the best single format and uniform capacities, each beside the full cache. Measured are KL and top-1 agreement behind
held-out prompts of two kinds, and needles, with the question inside the prompt and in a second turn. Writes
`paper.json` and `paper.md`; an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from xkv_fx.evaluation.dtypes import dtype_of
from xkv_fx.evaluation.quality.allocations import FORMATS, Line, lines_of, nats, plain
from xkv_fx.evaluation.quality.candidates import (
    CALIBRATED,
    JOINT,
    UNIFORM,
    Candidate,
    by_head,
    candidates_of_fractions,
    formats_of,
    is_of_one_format,
    label_of,
)
from xkv_fx.evaluation.quality.evaluate import AFTER, INSIDE, EvaluationSettings, evaluate
from xkv_fx.evaluation.quality.held_out import measure_held_out
from xkv_fx.evaluation.quality.results import FULL, Evaluation
from xkv_fx.evaluation.quality.sources import Wanted, reporter, sources_for, split_prompts
from xkv_fx.evaluation.tasks import NEEDLES
from xkv_fx.files import write_json
from xkv_fx.hf.capture import capture
from xkv_fx.hf.models import load_model
from xkv_fx.layers import with_itemsize
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.data.load_measured import load_measured
from xkv_fx.planning.data.profile_data import Profile
from xkv_fx.planning.measure.bootstrap import ratio_of_means
from xkv_fx.planning.measure.verify import VERIFY_CONTINUATION, summary

CALIBRATE_ON = 12
NEEDLE_TOKENS = 512
"""Longer contexts are hard for a model as small as SmolLM2 whatever its cache holds."""

console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """One plan.

    Attributes:
        name: of the plan.
        share: of the bytes of a full cache, that it takes.
        bits: that an element of a kept key or value takes, scales and zeros counted.
        kl: KL(full || plan) of each held-out prompt, nats.
        agreement: the share of tokens for which both prefer the same next one.
        needles: of each task, the share of right answers with the question inside and in a second turn.
    """

    name: str
    share: float
    bits: float
    kl: tuple[float, ...]
    agreement: float
    needles: dict[str, tuple[float, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    dtype = dtype_of(options.bytes_of)
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(options.model)
    tokens = options.context + VERIFY_CONTINUATION
    calibration_prompts, held_out = split_prompts(tokenizer, options.calibrate_on, options.prompts, tokens)
    given = [load_measured(path) for path in options.measured]
    allocators = {"layer": (CALIBRATED, JOINT), "head": (JOINT,)}
    sources: list[Profile | Calibration] = []
    seconds: dict[str, float] = {}
    with Progress(console=console) as bars:
        captured = capture(model, decode=False)
        for by in options.by:
            of_kind = tuple(source for source in given if (source.heads is None) == (by == "layer"))
            wanted = Wanted(allocators[by], tuple(options.formats), options.context, of_kind, options.out, (by,))
            found, taken = sources_for(captured, options.eviction, calibration_prompts, wanted, bars)
            sources += found
            seconds |= taken

        def plans(context: int) -> tuple[Candidate, ...]:
            return candidates_of_fractions(
                captured.layers, context, [options.fraction], sources, (CALIBRATED, JOINT),
                formats=formats_of(sources), dtype=dtype,
            )  # fmt: skip

        compared = plans(options.context)
        strayed = measure_held_out(
            captured,
            [plan.budgets for plan in compared],
            list(itertools.chain.from_iterable(held_out.values())),
            VERIFY_CONTINUATION,
            options.out / "held_out",
            reporter(bars, "held-out prompts"),
        )
        counted = with_itemsize(captured.layers, dtype.itemsize)
        lines = lines_of(compared, held_out, strayed, counted, options.context, apart=False)
        shown = _shown(lines)
        asked = evaluate(
            model,
            tokenizer,
            [plan for plan in plans(options.length) if plan.name in shown],
            EvaluationSettings(NEEDLES, length=options.length, count=options.examples),
            resume=options.out / "needles",
            progress=reporter(bars, "needles"),
            dtype=dtype,
        )
    rows = rows_of([next(line for line in lines if line.name == name) for name in shown], asked)
    text = as_table(rows, options)
    results = {
        "settings": {name: plain(value) for name, value in vars(options).items()},
        "calibration_seconds": seconds,
        "rows": [{**dataclasses.asdict(row), **_summary(row)} for row in rows],
        "plans": {line.name: line.plan for line in lines},
        "needles": asked.to_dict(),
    }
    write_json(options.out / "paper.json", results)
    (options.out / "paper.md").write_text(text, encoding="utf-8")
    print(text)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model folder, a .gguf file or an alias")
    parser.add_argument("--out", type=Path, default=Path("out/paper"))
    parser.add_argument("--prompts", type=int, default=20, help="held-out prompts of each kind of text")
    parser.add_argument("--examples", type=int, help="of each needle task; as many as prompts by default")
    parser.add_argument(
        "--calibrate-on", type=int, help=f"prompts; as many as held-out ones by default, at most {CALIBRATE_ON}"
    )
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt before its continuation")
    parser.add_argument(
        "--length", type=int, help=f"tokens of a needle's context; --context by default, at most {NEEDLE_TOKENS}"
    )
    parser.add_argument("--fraction", type=float, default=0.384, help="share of a full cache's bytes")
    parser.add_argument("--eviction", default="append", help="append, ring or scored")
    parser.add_argument(
        "--by", nargs="+", default=["head", "layer"], choices=["layer", "head"], help="what gets a capacity and formats"
    )
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="what is calibrated")
    parser.add_argument("--measured", nargs="*", type=Path, default=[], help="calibrations, instead of measuring them")
    parser.add_argument("--bytes-of", default="bfloat16", help="the dtype that bytes are counted in")
    options = parser.parse_args(arguments)
    options.examples = options.examples or options.prompts
    options.calibrate_on = options.calibrate_on or min(CALIBRATE_ON, options.prompts)
    options.length = options.length or min(NEEDLE_TOKENS, options.context)
    return options


def _shown(lines: Sequence[Line]) -> tuple[str, ...]:
    """The names of the plans that the table has: of single formats the best one, by its KL."""
    single = [line for line in lines if is_of_one_format(line.name)]
    best = min(single, key=lambda line: float(np.mean(line.kl)))
    solved = [name for name in (by_head(JOINT), JOINT, CALIBRATED) if any(line.name == name for line in lines)]
    return (*solved, best.name, UNIFORM)


def rows_of(lines: Sequence[Line], asked: Evaluation) -> tuple[Row, ...]:
    """The full cache's row, and one for each of these plans, in their order."""
    prompts = len(lines[0].kl)
    full = Row(FULL, 1.0, 8.0 * dtype_of(asked.dtype).itemsize, (0.0,) * prompts, 1.0, _needles(asked, FULL))
    plans = [
        Row(line.name, line.share, line.bits, line.kl, float(np.mean(line.agreement)), _needles(asked, line.name))
        for line in lines
    ]
    return (full, *plans)


def _needles(asked: Evaluation, name: str) -> dict[str, tuple[float, float]]:
    found = {(row.task, row.form): row.mean for row in asked.rows if row.name == name}
    return {task: (found[task, INSIDE], found[task, AFTER]) for task in NEEDLES}


def _summary(row: Row) -> dict[str, float]:
    return {f"{name}_kl": value for name, value in summary(row.kl).items()}


def as_table(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """Markdown: a row for each plan, and how the first one compares with the others."""
    prompts, bytes_of = len(rows[0].kl), options.bytes_of
    names = [task.removeprefix("needle_").replace("_", " ") for task in NEEDLES]
    lines = [
        f"{label_of(1 - options.fraction)} less memory than a full {bytes_of} cache, eviction={options.eviction!r}: KL "
        f"and top-1 agreement of the {VERIFY_CONTINUATION} tokens behind {prompts} held-out prompts of "
        f"{options.context:,} tokens; needles found of {options.examples} examples of each kind in contexts of "
        f"{options.length:,} tokens, with the question inside the prompt / in a second turn.",
        "",
        f"| plan | bytes | bits an element | mean KL | median | 95th percentile | top-1 | {' | '.join(names)} |",
        "|---" * (7 + len(names)) + "|",
    ]
    for row in rows:
        kl = [nats(value) if value else "0" for value in summary(row.kl).values()]
        found = [f"{inside:.0%} / {after:.0%}" for inside, after in row.needles.values()]
        cells = [row.name, f"{row.share:.1%}", f"{row.bits:.2f}", *kl, f"{row.agreement:.1%}", *found]
        lines.append(f"| {' | '.join(cells)} |")
    _, first, *others = rows
    lines.append("")
    for row in others:
        ratio = ratio_of_means(np.array(first.kl), np.array(row.kl))
        change = f"{ratio.value - 1:+.0%} [{ratio.low - 1:+.0%}, {ratio.high - 1:+.0%}]"
        lines.append(f"- mean KL of {first.name} against {row.name}, with its paired 95 % interval: {change}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
