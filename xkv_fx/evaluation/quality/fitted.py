"""The promise of `fit`: on text of another kind, its plan is at least as good as each of its rivals at equal bytes.

    python -m xkv_fx.evaluation.quality.fitted --out out/fitted

Fits a share of the full cache's bytes on documentation within a time, then measures its plan on source code, which it
has not seen, beside the plans that it compared with, capacities alone by layer among them. Writes `fitted.json` and
`fitted.md`; an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

import xkv_fx
from xkv_fx.budgets import Plan
from xkv_fx.evaluation.dtypes import dtype_of
from xkv_fx.evaluation.quality.allocations import nats, plain
from xkv_fx.evaluation.quality.candidates import label_of
from xkv_fx.evaluation.quality.sources import CALIBRATED_ON, reporter
from xkv_fx.evaluation.texts import KINDS, cut_prompts
from xkv_fx.files import write_json
from xkv_fx.hf.capture import capture
from xkv_fx.hf.models import load_model
from xkv_fx.planning.measure.bootstrap import ratio_of_means
from xkv_fx.planning.measure.held_out import HeldOut
from xkv_fx.planning.measure.verify import VERIFY_CONTINUATION, summary

UNSEEN = "source code"

console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Rival:
    """A plan on text of another kind than it was made from.

    Attributes:
        name: how it was made.
        kv_bytes: that its K/V buffers take, room for generated tokens included.
        kl: KL(full || plan) of each prompt, nats.
        ratio: mean KL of the plan of `fit` over that of this one, with its paired 95 % interval.
    """

    name: str
    kv_bytes: int
    kl: tuple[float, ...]
    ratio: tuple[float, float, float]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    model, tokenizer = load_model(options.model, dtype_of(options.dtype))
    tokens = options.context + VERIFY_CONTINUATION
    prompts = cut_prompts(tokenizer, KINDS[CALIBRATED_ON](), options.prompts, tokens)
    unseen = cut_prompts(tokenizer, KINDS[UNSEEN](), options.unseen, tokens)
    captured = capture(model, decode=False)
    found, text = {}, []
    with Progress(console=console) as bars:
        for fraction in options.fractions:
            label = label_of(fraction)
            folder = options.out / label.rstrip("%")
            folder.mkdir(parents=True, exist_ok=True)
            limit = {"fraction": fraction, "context": options.context, "max_new_tokens": options.new_tokens}
            fit, seconds = _fitted(model, prompts, limit, options.seconds, folder / "fit", bars)
            alone, _ = _fitted(
                model, prompts, {**limit, "formats": ("model",), "by": ("layer",)}, None, folder / "alone", bars
            )
            plans: dict[str, Plan] = {one.name: one.budgets for one in fit.candidates}
            plans |= {f"{one.name}, model": one.budgets for one in alone.candidates if "by layer" in one.name}
            measured = HeldOut(captured, [(ids, VERIFY_CONTINUATION) for ids in unseen], folder / "unseen").measure(
                list(plans.values()), progress=reporter(bars, f"{label}: {UNSEEN}")
            )
            kv_bytes = [plan.kv_bytes(captured.layers, 1, None, options.new_tokens) for plan in plans.values()]
            rivals = rivals_of(list(plans), kv_bytes, measured.kl.T)
            found[label] = {
                "seconds": seconds,
                "fit": fit.to_dict(),
                "unseen": [{**dataclasses.asdict(rival), **summary(rival.kl)} for rival in rivals],
            }
            text.append(as_table(rivals, label, seconds, fit.report.left_out, options))
    settings = {name: plain(value) for name, value in vars(options).items()}
    write_json(options.out / "fitted.json", {"settings": settings, "limits": found})
    (options.out / "fitted.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model folder, a .gguf file or an alias")
    parser.add_argument("--dtype", default="bfloat16", help="of the model, and so of a full cache")
    parser.add_argument("--out", type=Path, default=Path("out/fitted"))
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.25, 0.125], help="shares of a full cache")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt before its continuation")
    parser.add_argument("--new-tokens", type=int, default=VERIFY_CONTINUATION, help="that fit may set room aside for")
    parser.add_argument("--prompts", type=int, default=24, help="of documentation, for fit")
    parser.add_argument("--unseen", type=int, default=20, help="prompts of source code")
    parser.add_argument("--seconds", type=float, default=600, help="that a fit may take")
    return parser.parse_args(arguments)


def _fitted(
    model: Any, prompts: Sequence[Any], limit: dict[str, Any], seconds: float | None, resume: Path, bars: Progress
) -> tuple[xkv_fx.Fit, float]:
    """What `fit` finds, and the seconds that it took: near none where it was done before."""
    resume.mkdir(exist_ok=True)
    task = bars.add_task("fit", total=None)
    started = time.perf_counter()
    fit = xkv_fx.fit(
        model,
        prompts,
        seconds=seconds,
        resume=resume,
        progress=lambda what, done, total: bars.update(task, description=what, completed=done, total=total),
        **limit,
    )
    return fit, time.perf_counter() - started


def rivals_of(names: Sequence[str], kv_bytes: Sequence[int], kl: NDArray[np.float64]) -> tuple[Rival, ...]:
    """The plans, of which the first is that of `fit`, each with what that one strays in proportion to it.

    Args:
        kl: of each plan and prompt, nats, float64 `[plans, prompts]`.
    """
    ratios = (ratio_of_means(kl[0], of_plan) for of_plan in kl)
    return tuple(
        Rival(name, taken, tuple(of_plan.tolist()), (ratio.value, ratio.low, ratio.high))
        for name, taken, of_plan, ratio in zip(names, kv_bytes, kl, ratios, strict=True)
    )


def as_table(
    rivals: Sequence[Rival], label: str, seconds: float, left_out: Sequence[str], options: argparse.Namespace
) -> str:
    """Markdown: a row for each plan, that of `fit` first, then the best ones first."""
    chosen, *others = rivals
    lines = [
        f"{label} of a full {options.dtype} cache of {options.context:,} tokens; {options.prompts} prompts of "
        f"documentation, {options.seconds:g} s given and {seconds:.0f} s taken; {len(chosen.kl)} prompts of {UNSEEN}",
        "",
        "| plan | bytes | mean KL | median | 95th percentile | fit against it, 95 % |",
        "|---|---|---|---|---|---|",
    ]
    for rival in (chosen, *sorted(others, key=lambda one: float(np.mean(one.kl)))):
        value, low, high = (f"{part - 1:+.0%}" for part in rival.ratio)
        name, against = (f"**fit**: {rival.name}", "") if rival is chosen else (rival.name, f"{value} [{low}, {high}]")
        kl = " | ".join(nats(each) for each in summary(rival.kl).values())
        lines.append(f"| {name} | {rival.kv_bytes:,} | {kl} | {against} |")
    return "\n".join([*lines, "", *left_out, ""])


if __name__ == "__main__":
    main()
