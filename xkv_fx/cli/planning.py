"""Commands that measure a model, solve a plan, and measure the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import xkv_fx
from xkv_fx.cli.common import (
    Json,
    Plan,
    app,
    console,
    errors,
    interruptible,
    is_first,
    names,
    out_file,
    processes,
    progress,
    read,
    show,
    text_file,
    warnings_as_lines,
)
from xkv_fx.cli.model_options import THE_MODEL, ModelOptions, with_model
from xkv_fx.cli.showing import show_plan, summary_of
from xkv_fx.errors import BudgetError
from xkv_fx.formats import pair_name, pair_of_name
from xkv_fx.planning.data.load_measured import load_measured
from xkv_fx.sizes import number_or_word

Texts = Annotated[list[Path], text_file("Text files, each of them a prompt; may be given repeatedly.")]
Length = Annotated[
    int | None,
    typer.Option(
        help="Split each text into prompts of so many tokens, without the rest; a shorter text is one prompt.",
        min=2,
    ),
]
Scorer = Annotated[str, typer.Option(help="How tokens are ranked.")]
Recent = Annotated[int | None, typer.Option(help="Newest tokens always kept; min(64, C/4) by default.")]
Sinks = Annotated[int, typer.Option(help="First tokens always kept.")]
Continuation = Annotated[int, typer.Option(help="Last tokens of each prompt, fed as decode would and measured.", min=1)]
By = Annotated[str, typer.Option(help="What gets a capacity of its own: layer or head.")]


@app.command()
@with_model
def profile(
    out: Annotated[Path, out_file("Where to write the profile.")],
    prompts: Texts,
    model: ModelOptions = THE_MODEL,
    length: Length = None,
    sampling: Annotated[
        str, typer.Option(help="Share of the prompts to measure, as 0.2 or 20%.", metavar="SHARE")
    ] = "1",
    statistics: Annotated[
        list[str] | None, typer.Option(help="preference (for the allocator entropy), similarity (for squeeze).")
    ] = None,
    scorer: Scorer = "snapkv",
    eviction: Annotated[str, typer.Option(help="ring, scored, append or none.")] = "ring",
    recent: Recent = None,
    sinks: Sinks = 0,
    by: By = "layer",
    json_: Json = False,
) -> None:
    """Measure how much attention mass each layer keeps at every capacity.

    Under torchrun, processes share the prompts.
    """
    policy = xkv_fx.Policy(scorer=scorer, eviction=eviction, recent=recent, sinks=sinks)  # type: ignore[arg-type]
    with processes() as group:
        loaded, tokenizer = model.load()
        rows = token_rows(prompts, tokenizer, length)
        with progress("profile", shown=is_first(group)) as advance:
            measured = xkv_fx.profile(
                loaded,
                rows,
                sampling=number_or_word(sampling),
                policy=policy,
                progress=advance,
                statistics=tuple(statistics or ()),
                group=group,
                by=by,
            )
        if is_first(group):
            measured.save(out)
            show({"profile": str(out), **summary_of(measured)}, json_)


@app.command()
@with_model
def calibrate(
    out: Annotated[Path, out_file("Where to write the calibration.")],
    prompts: Texts,
    model: ModelOptions = THE_MODEL,
    length: Length = None,
    continuation: Continuation = 16,
    grid: Annotated[
        list[float] | None, typer.Option(help="Capacities as shares of a prompt, ascending; may be given repeatedly.")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(help="What slots may store, of model, int8, int4 and fp8; the model's dtype alone by default."),
    ] = None,
    scorer: Scorer = "snapkv",
    eviction: Annotated[str, typer.Option(help="ring, scored or append: what will serve.")] = "ring",
    recent: Recent = None,
    sinks: Sinks = 0,
    by: By = "layer",
    json_: Json = False,
) -> None:
    """Measure the KL to the full cache when one layer alone holds less, or stores fewer bits.

    Goes on where it was interrupted. Under torchrun, processes share the prompts.
    """
    from xkv_fx.planning.measure.partial_results import remove_parts

    policy = xkv_fx.Policy(scorer=scorer, eviction=eviction, recent=recent, sinks=sinks)  # type: ignore[arg-type]
    parts = out.with_name(f"{out.name}.parts")
    with processes() as group:
        loaded, tokenizer = model.load()
        rows = token_rows(prompts, tokenizer, None if length is None else length + continuation)
        with interruptible(parts), progress("calibrate", shown=is_first(group)) as advance:
            measured = xkv_fx.calibrate(
                loaded,
                rows,
                grid=grid,
                policy=policy,
                continuation=continuation,
                progress=advance,
                resume=parts,
                group=group,
                formats=None if formats is None else names(formats),
                by=by,
            )
        if is_first(group):
            measured.save(out)
            remove_parts(parts)
            points = {"grid": sorted(set(measured.grid)), "formats": [pair_name(pair) for pair in measured.pairs]}
            show({"calibration": str(out), **summary_of(measured), **points}, json_)


@app.command()
@with_model
def solve(
    measured: Annotated[Path, typer.Argument(help="A profile or a calibration.")],
    out: Annotated[Path, out_file("Where to write the budgets.")],
    fraction: Annotated[
        str | None,
        typer.Option(help="Share to keep of the full cache's bytes, as 0.384 or 38.4%.", metavar="SHARE"),
    ] = None,
    total_tokens: Annotated[int | None, typer.Option(help="Sum of the capacities.")] = None,
    retention: Annotated[
        str | None, typer.Option(help="Mean share of attention mass to keep, as 0.9 or 90%.", metavar="SHARE")
    ] = None,
    kv_bytes: Annotated[
        str | None, typer.Option(help="Most bytes of KV cache, as 40000000, 40MB or 1.5GiB.", metavar="SIZE")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that --kv-bytes is for.", min=1)] = 1,
    max_new_tokens: Annotated[
        int, typer.Option(help="Room for generated tokens under append that --kv-bytes holds, too.", min=0)
    ] = 0,
    context: Annotated[int | None, typer.Option(help="Tokens to plan for; the longest prompt by default.")] = None,
    allocator: Annotated[
        str | None, typer.Option(help="By default xkv for a profile, calibrated for a calibration.")
    ] = None,
    multiple: Annotated[int, typer.Option(help="Round capacities to multiples of this.", min=1)] = 16,
    floor: Annotated[int, typer.Option(help="Fewest slots of a layer.", min=1)] = 1,
    formats: Annotated[
        str | None, typer.Option(help="Of a profile: what all layers store in, as int8 or int8/int4.", metavar="PAIR")
    ] = None,
    holdout: Annotated[
        list[Path] | None, text_file("Text files to measure the plan on, against others at equal bytes.")
    ] = None,
    fall_back: Annotated[
        bool, typer.Option(help="If the solved plan is not better, write the best that it was compared with.")
    ] = False,
    model: ModelOptions = THE_MODEL,
    length: Length = None,
    continuation: Continuation = 48,
    json_: Json = False,
) -> None:
    """Solve how many slots each layer gets; give exactly one of the constraints.

    From a calibration of several formats, each layer's formats are chosen with them.

    With --holdout the plan is measured on those texts; the result is stored in the plan, with a warning if the plan is
    not better than uniform, or than one format for all layers.
    """
    if fall_back and not holdout:
        raise BudgetError("--fall-back needs --holdout: without held-out texts nobody knows whether the plan is better")
    with warnings_as_lines():
        budgets = xkv_fx.solve(
            load_measured(measured),
            fraction=fraction and number_or_word(fraction),
            total_tokens=total_tokens,
            retention=retention and number_or_word(retention),
            kv_bytes=kv_bytes and number_or_word(kv_bytes),  # type: ignore[arg-type]  # solve refuses what is not whole
            batch_size=batch_size,
            context=context,
            allocator=allocator,
            multiple=multiple,
            floor=floor,
            max_new_tokens=max_new_tokens,
            formats=None if formats is None else pair_of_name(formats),
        )
    if holdout:
        report = _verify(budgets, holdout, model, length, continuation)
        errors.print(str(report), markup=False, soft_wrap=True)
        plan = report.stored_in(budgets)
        if report.best != "plan":
            kept = "that plan is written instead" if fall_back else "--fall-back writes that plan instead"
            errors.print(
                f"warning: the plan is not better than {report.rival} on these prompts; {kept}",
                style="yellow",
                markup=False,
                soft_wrap=True,
            )
            plan = report.rival_plan(budgets) if fall_back else plan
        budgets = plan
    budgets.save(out)
    show_plan(budgets, json_, out)


@app.command()
@with_model
def verify(
    plan: Plan,
    prompts: Texts,
    model: ModelOptions = THE_MODEL,
    length: Length = None,
    continuation: Continuation = 48,
    out: Annotated[Path | None, out_file("Write the plan with the result in it here.")] = None,
    json_: Json = False,
) -> None:
    """Measure a plan on held-out texts, against others of equal bytes: uniform, and one format for all layers."""
    budgets = xkv_fx.Budgets.load(plan)
    report = _verify(budgets, prompts, model, length, continuation)
    if out is not None:
        report.stored_in(budgets).save(out)
    if not json_:
        console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    show({"better": report.better, **report.to_dict()}, json_)


def _verify(
    budgets: xkv_fx.Budgets, texts: list[Path], model: ModelOptions, length: int | None, continuation: int
) -> xkv_fx.Verification:
    loaded, tokenizer = model.load()
    rows = token_rows(texts, tokenizer, None if length is None else length + continuation)
    with progress("verify") as advance:
        return xkv_fx.verify(loaded, budgets, rows, continuation=continuation, progress=advance)


def token_rows(files: list[Path], tokenizer: Any, length: int | None) -> list[list[int]]:
    rows = []
    for file in files:
        ids: list[int] = tokenizer(read(file))["input_ids"]
        step = len(ids) if length is None else length
        rows += [ids[start : start + step] for start in range(0, max(len(ids) - step, 0) + 1, max(step, 1))]
    return rows
