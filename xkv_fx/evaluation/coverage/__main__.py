"""Which causal language models are taken: every class that transformers registers, tiny and with random weights.

    python -m xkv_fx.evaluation.coverage --output docs/coverage.md

What makes a class exact, refused or failed is said in `classify`.
"""

from __future__ import annotations

import collections
import multiprocessing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

from xkv_fx.evaluation.coverage.classify import LONG, PROMPT, STEPS, TOLERANCE, Verdict, work
from xkv_fx.evaluation.coverage.tiny import Registered, registered

TIME_LIMIT = 240.0
# What every process needs and would take seconds to import: it is imported once, and processes are forked from there.
PRELOADED = (
    "xkv_fx.evaluation.coverage.classify",
    "xkv_fx.hf.generation",
    "xkv_fx.hf.capture",
    "xkv_fx.api",
    "xkv_fx.lowering.plain",
    "torch._dynamo",
    "torch.export._trace",
)


def sweep(
    entries: Sequence[Registered], time_limit: float = TIME_LIMIT, console: Console | None = None
) -> list[Verdict]:
    """Classify each entry in a process of its own, so that none can stall or crash the others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    verdicts = []
    for entry in entries:
        verdicts.append(_guarded(context, entry, time_limit))
        if console is not None:
            last = verdicts[-1]
            console.print(f"{last.outcome:8} {last.name}  {last.reason}  ({last.seconds:.1f} s)", markup=False)
    return verdicts


def _guarded(context: Any, entry: Registered, time_limit: float) -> Verdict:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(entry, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(time_limit):
            verdict: Verdict = receiver.recv()
            return verdict
        return Verdict(entry.name, "failed", f"not done after {time_limit:.0f} s", time_limit)
    except EOFError:
        process.join()
        return Verdict(entry.name, "failed", f"the process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def table(verdicts: Iterable[Verdict]) -> str:
    """One Markdown row a class."""
    rows = (f"| {v.name} | {v.outcome} | {v.reason.replace('|', '/')} |" for v in verdicts)
    return "\n".join(("| Class | Outcome | Reason |", "|---|---|---|", *rows))


def counts(verdicts: Iterable[Verdict]) -> str:
    """Such as `139 exact, 50 refused, 0 failed of 189`."""
    found = collections.Counter(verdict.outcome for verdict in verdicts)
    return f"{found['exact']} exact, {found['refused']} refused, {found['failed']} failed of {found.total()}"


def _document(verdicts: Sequence[Verdict]) -> str:
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    return (
        "# Coverage\n\n"
        "Every causal language model that transformers registers, built tiny with random weights. "
        "`make coverage` writes this file.\n\n"
        f"**{counts(verdicts)}** ({versions}, CPU, float32).\n\n"
        f"*exact*: at full budgets, {STEPS} greedy tokens behind a prompt of {PROMPT} are those of transformers' own "
        f"cached generation, logits within {TOLERANCE:.0e}; at half budgets the bytes allocated are those of the plan, "
        f"and {LONG} tokens are generated without NaN. "
        "*refused*: `transform` says why it does not take the model, or there is no reference to compare with, since "
        "this version of transformers cannot build the class here or its own generation is broken. "
        "*failed*: anything else.\n\n"
        f"{table(verdicts)}\n"
    )


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Classes or model types; all of them by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="The Markdown file to write.")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for each class.")] = TIME_LIMIT,
) -> None:
    """Classify causal language models as exact, refused or failed."""
    console = Console(soft_wrap=True, highlight=False)
    entries = [entry for entry in registered() if not names or {entry.class_name, entry.model_type} & set(names)]
    if not entries:
        raise typer.BadParameter(f"no registered class or model type is called {', '.join(names or [])}")
    verdicts = sweep(entries, time_limit, console)
    console.print(counts(verdicts))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(_document(verdicts), encoding="utf-8")
    if any(verdict.outcome == "failed" for verdict in verdicts):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
