"""`fit`: from a limit and some texts to a plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

import xkv_fx
from xkv_fx.cli.common import Json, app, console, errors, interruptible, names, out_file, show
from xkv_fx.cli.model_options import THE_MODEL, ModelOptions, with_model
from xkv_fx.cli.planning import Length, Texts, token_rows
from xkv_fx.files import write_json
from xkv_fx.sizes import as_text


@app.command()
@with_model
def fit(
    out: Annotated[Path, out_file("Where to write the budgets; each better plan replaces the one before.")],
    prompts: Texts,
    model: ModelOptions = THE_MODEL,
    length: Length = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", "--kv-bytes", help="Most bytes of KV cache, as 40MB or 1.5GiB.", metavar="SIZE"),
    ] = None,
    fraction: Annotated[
        str | None, typer.Option(help="Or a share of the full cache's bytes, as 0.25 or 25%.", metavar="SHARE")
    ] = None,
    kl: Annotated[
        float | None, typer.Option(help="Or a bound on the KL to the full cache, in nats; takes the fewest bytes.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that the limit is for.", min=1)] = 1,
    context: Annotated[int | None, typer.Option(help="Tokens of prompt to plan for; the longest by default.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Generated tokens to set room aside for inside the limit, if that is best.", min=0)
    ] = 0,
    seconds: Annotated[
        float | None, typer.Option(help="Time that it may take, about; as much as it needs by default.")
    ] = None,
    formats: Annotated[str, typer.Option(help="What slots may store, between commas.")] = "model,int8,int4",
    scorers: Annotated[str, typer.Option(help="What may rank tokens, between commas.")] = (
        "snapkv,expected_attention,key_diff"
    ),
    by: Annotated[str, typer.Option(help="What gets a capacity of its own, between commas.")] = "layer,head",
    continuation: Annotated[int, typer.Option(help="Last tokens of each held-out prompt, measured.", min=1)] = 48,
    report: Annotated[Path | None, out_file("Write what was found as JSON here.")] = None,
    picture: Annotated[Path | None, out_file("Draw quality over bytes here (.png, .svg, .pdf).")] = None,
    json_: Json = False,
) -> None:
    """Find the best plan under a limit, and say what the limit costs.

    Every other prompt is held out to compare plans on. Goes on where it was interrupted.
    """
    from xkv_fx.planning.fit.search import remove_fit_parts

    parts = out.with_name(f"{out.name}.parts")
    loaded, tokenizer = model.load()
    rows = token_rows(prompts, tokenizer, length)
    with interruptible(parts), steps() as advance:
        found = xkv_fx.fit(
            loaded,
            rows,
            memory=memory,
            fraction=fraction,
            kl=kl,
            batch_size=batch_size,
            context=context,
            max_new_tokens=max_new_tokens,
            seconds=seconds,
            formats=names(formats),
            scorers=names(scorers),
            by=names(by),
            continuation=continuation,
            resume=parts,
            progress=advance,
            found=lambda plan, how: plan.save(out),
        )
    found.budgets.save(out)
    if report is not None:
        write_json(report, found.to_dict())
    if picture is not None:
        from xkv_fx.evaluation.pictures import draw_fit

        draw_fit(found, picture)
    remove_fit_parts(parts)
    if json_:
        show({"budgets": str(out), **found.to_dict()}, True)
        return
    console.print(_table(found))
    for line in (*found.report.advice, *found.report.left_out):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def steps() -> Iterator[Any]:
    """A progress bar whose task has a name that changes."""
    with Progress(console=errors) as bar:
        task = bar.add_task("fit", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _table(found: xkv_fx.Fit) -> Table:
    report = found.report
    limit = f"a KL of {report.bound:g}" if report.limit is None else as_text(report.limit)
    asked = f"{limit}, {report.context:,} tokens of context, {report.batch_size} rows"
    table = Table(
        "plan", "stored as", "mean tokens", "bytes", "of full", "held-out KL", "chosen against it, 95 %",
        title=f"{asked}; {report.held_out} held-out prompts",
    )  # fmt: skip
    for place, candidate in enumerate(found.candidates):
        change = candidate.ratio
        against = "" if place == 0 else f"{change.value - 1:+.0%} ({change.low - 1:+.0%} to {change.high - 1:+.0%})"
        table.add_row(
            candidate.name,
            candidate.stored,
            f"{candidate.budgets.total_tokens / len(candidate.budgets.capacities):.0f}",
            f"{candidate.kv_bytes:,}",
            f"{candidate.kv_bytes / report.full_bytes:.1%}",
            f"{candidate.mean_kl:.4f}",
            against,
            style="bold" if place == 0 else None,
        )
    return table
