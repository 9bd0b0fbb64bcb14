"""The command line: the public calls under the same names."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import xkv_fx
from xkv_fx.errors import BudgetError, PromptError, XkvError
from xkv_fx.files import write_json
from xkv_fx.planning.load_measured import load_measured

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Per-layer KV cache budgets: measure, solve, generate, inspect."
)
_console = Console()
_errors = Console(stderr=True)

Model = Annotated[str, typer.Option(help="A model folder, a .gguf file, or the alias smollm2.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Plan = Annotated[Path, typer.Argument(help="A budgets file.")]
Texts = Annotated[list[Path], typer.Option(help="Text files, each of them a prompt; may be given repeatedly.")]
Length = Annotated[int | None, typer.Option(help="Cut each text into prompts of so many tokens.", min=2)]
Scorer = Annotated[str, typer.Option(help="How tokens are ranked.")]
Recent = Annotated[int | None, typer.Option(help="Newest tokens always kept; min(64, C/4) by default.")]
Sinks = Annotated[int, typer.Option(help="First tokens always kept.")]
Continuation = Annotated[int, typer.Option(help="Last tokens of each prompt, fed as decode would and measured.", min=1)]


def main() -> None:
    """Run the command line; an error of ours is one line and exit code 2."""
    try:
        app()
    except (XkvError, OSError) as error:
        _errors.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)


@app.command()
def profile(
    out: Annotated[Path, typer.Option(help="Where to write the profile.")],
    prompts: Texts,
    model: Model = "smollm2",
    length: Length = None,
    sampling: Annotated[float, typer.Option(help="Share of the prompts to measure.")] = 1.0,
    statistics: Annotated[
        list[str] | None, typer.Option(help="preference (for the allocator entropy), similarity (for squeeze).")
    ] = None,
    scorer: Scorer = "snapkv",
    eviction: Annotated[str, typer.Option(help="ring, scored, append or none.")] = "ring",
    recent: Recent = None,
    sinks: Sinks = 0,
    json_: Json = False,
) -> None:
    """Measure how much attention mass each layer keeps at every capacity."""
    policy = xkv_fx.Policy(scorer=scorer, eviction=eviction, recent=recent, sinks=sinks)  # type: ignore[arg-type]
    loaded, tokenizer = _load(model)
    rows = _token_rows(prompts, tokenizer, length)
    with _progress("profile") as advance:
        measured = xkv_fx.profile(
            loaded, rows, sampling=sampling, policy=policy, progress=advance, statistics=tuple(statistics or ())
        )
    measured.save(out)
    _show(
        {
            "profile": str(out),
            "model": measured.model,
            "layers": len(measured.layers),
            "prompts": len(measured.lengths),
            "longest": measured.context_default,
        },
        json_,
    )


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="Where to write the calibration.")],
    prompts: Texts,
    model: Model = "smollm2",
    length: Length = None,
    continuation: Continuation = 16,
    grid: Annotated[
        list[float] | None, typer.Option(help="Capacities as shares of a prompt, ascending; may be given repeatedly.")
    ] = None,
    scorer: Scorer = "snapkv",
    eviction: Annotated[str, typer.Option(help="ring, scored or append: what will serve.")] = "ring",
    recent: Recent = None,
    sinks: Sinks = 0,
    json_: Json = False,
) -> None:
    """Measure the KL to the full cache when one layer alone holds less. Goes on where it was interrupted."""
    from xkv_fx.planning.calibrate import remove_parts

    policy = xkv_fx.Policy(scorer=scorer, eviction=eviction, recent=recent, sinks=sinks)  # type: ignore[arg-type]
    loaded, tokenizer = _load(model)
    rows = _token_rows(prompts, tokenizer, None if length is None else length + continuation)
    parts = out.with_name(f"{out.name}.parts")
    try:
        with _progress("calibrate") as advance:
            measured = xkv_fx.calibrate(
                loaded, rows, grid=grid, policy=policy, continuation=continuation, progress=advance, resume=parts
            )
    except KeyboardInterrupt:
        _errors.print(
            f"interrupted; what was measured is kept in {parts}, and the same command goes on from there", markup=False
        )
        raise typer.Exit(130) from None
    measured.save(out)
    remove_parts(parts)
    _show(
        {
            "calibration": str(out),
            "model": measured.model,
            "layers": len(measured.layers),
            "prompts": len(measured.lengths),
            "longest": measured.context_default,
            "grid": list(measured.grid),
        },
        json_,
    )


@app.command()
def solve(
    measured: Annotated[Path, typer.Argument(help="A profile or a calibration.")],
    out: Annotated[Path, typer.Option(help="Where to write the budgets.")],
    fraction: Annotated[float | None, typer.Option(help="Share of layers x context to keep.")] = None,
    total_tokens: Annotated[int | None, typer.Option(help="Sum of the capacities.")] = None,
    retention: Annotated[float | None, typer.Option(help="Mean share of attention mass to keep.")] = None,
    kv_bytes: Annotated[int | None, typer.Option(help="Most bytes of KV cache.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that --kv-bytes is for.", min=1)] = 1,
    context: Annotated[int | None, typer.Option(help="Tokens to plan for; the longest prompt by default.")] = None,
    allocator: Annotated[
        str | None, typer.Option(help="By default xkv for a profile, calibrated for a calibration.")
    ] = None,
    multiple: Annotated[int, typer.Option(help="Round capacities to multiples of this.", min=1)] = 16,
    floor: Annotated[int, typer.Option(help="Fewest slots of a layer.", min=1)] = 1,
    holdout: Annotated[
        list[Path] | None, typer.Option(help="Text files to measure the plan on, against uniform at equal bytes.")
    ] = None,
    fall_back: Annotated[bool, typer.Option(help="Write the uniform plan if the solved one is not better.")] = False,
    model: Model = "smollm2",
    length: Length = None,
    continuation: Continuation = 48,
    json_: Json = False,
) -> None:
    """Solve how many slots each layer gets; give exactly one of the constraints.

    With --holdout the plan is measured on those texts; what was found is stored in it, and a plan that is not better
    than uniform is warned of.
    """
    if fall_back and not holdout:
        raise BudgetError("--fall-back needs --holdout: without held-out texts nobody knows whether the plan is better")
    budgets = xkv_fx.solve(
        load_measured(measured),
        fraction=fraction,
        total_tokens=total_tokens,
        retention=retention,
        kv_bytes=kv_bytes,
        batch_size=batch_size,
        context=context,
        allocator=allocator,
        multiple=multiple,
        floor=floor,
    )
    if holdout:
        report = _verify(budgets, holdout, model, length, continuation)
        _errors.print(str(report), markup=False, soft_wrap=True)
        plan = report.stored_in(budgets)
        if not report.better:
            kept = "the uniform plan is written instead" if fall_back else "--fall-back writes the uniform plan instead"
            _errors.print(
                f"warning: the plan is not better than uniform on these prompts; {kept}", style="yellow", soft_wrap=True
            )
            plan = report.uniform_plan(budgets) if fall_back else plan
        budgets = plan
    budgets.save(out)
    _show_plan(budgets, json_)


@app.command()
def verify(
    plan: Plan,
    prompts: Texts,
    model: Model = "smollm2",
    length: Length = None,
    continuation: Continuation = 48,
    out: Annotated[Path | None, typer.Option(help="Write the plan with the result in it here.")] = None,
    json_: Json = False,
) -> None:
    """Measure a plan on held-out texts, against a uniform plan of equal bytes."""
    budgets = xkv_fx.Budgets.load(plan)
    report = _verify(budgets, prompts, model, length, continuation)
    if out is not None:
        report.stored_in(budgets).save(out)
    if not json_:
        _console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    _show({"better": report.better, **report.to_dict()}, json_)


@app.command()
def generate(
    plan: Annotated[Path | None, typer.Argument(help="A budgets file; none with --engine.")] = None,
    engine: Annotated[Path | None, typer.Option(help="A folder that xkv-fx export wrote, in place of a plan.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with the prompt.")] = None,
    model: Model = "smollm2",
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to generate.", min=1)] = 64,
    backend: Annotated[str, typer.Option(help="inductor or eager.")] = "inductor",
    trust: Annotated[bool, typer.Option(help="Take an engine of the target pt2, which is read with pickle.")] = False,
    json_: Json = False,
) -> None:
    """Generate with a plan's budgets or with an engine, greedily."""
    if (prompt is None) == (prompt_file is None):
        raise PromptError("give either --prompt or --prompt-file")
    text = prompt if prompt is not None else _read(prompt_file)
    llm: Any
    if engine is not None and plan is None:
        from xkv_fx.hf.models import load_tokenizer

        llm = xkv_fx.load(engine, trust=trust)
        tokenizer: Any = load_tokenizer(engine / "tokenizer")
        ids = tokenizer(text, return_tensors="pt")
        output = llm.generate(ids["input_ids"], max_new_tokens)
    elif plan is not None and engine is None:
        budgets = xkv_fx.Budgets.load(plan)
        loaded, tokenizer = _load(model)
        ids = tokenizer(text, return_tensors="pt")
        llm = xkv_fx.transform(loaded, budgets, backend=backend, max_new_tokens=max_new_tokens)
        output = llm.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False)
    else:
        raise BudgetError("give either a budgets file or --engine")
    answer = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    if json_:
        _show({"text": answer, "prompt_tokens": ids["input_ids"].shape[1], "kv_bytes": llm.kv_bytes}, True)
    else:
        _console.print(answer, markup=False, highlight=False)


@app.command()
def export(
    plan: Plan,
    out: Annotated[Path, typer.Option(help="The engine's folder, a new one.")],
    model: Model = "smollm2",
    target: Annotated[str, typer.Option(help="aoti: compiled for this machine; pt2: portable, with pickle.")] = "aoti",
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.", min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Room for generated tokens under append.", min=0)] = 0,
    json_: Json = False,
) -> None:
    """Write an engine: a folder that generates without transformers, the model's code, or a compiler."""
    budgets = xkv_fx.Budgets.load(plan)
    loaded, tokenizer = _load(model)
    llm = xkv_fx.transform(loaded, budgets, batch_size=batch_size, backend="eager", max_new_tokens=max_new_tokens)
    xkv_fx.export(llm, out, target=target, tokenizer=tokenizer)
    _show_engine(out, json_)


@app.command("eval")
def eval_(
    plans: Annotated[list[Path] | None, typer.Option(help="Budgets files; may be given repeatedly.")] = None,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Profiles and calibrations to solve plans from; may be given repeatedly.")
    ] = None,
    model: Model = "smollm2",
    allocators: Annotated[str | None, typer.Option(help="Names between commas; by default each file's own.")] = None,
    fractions: Annotated[str, typer.Option(help="Shares of the full cache, between commas.")] = "0.125,0.25,0.384,0.5",
    scorers: Annotated[str, typer.Option(help="Further scorers, with uniform plans, between commas.")] = "",
    tasks: Annotated[
        str | None, typer.Option(help="Between commas; all by default. continuation compares distributions.")
    ] = None,
    forms: Annotated[
        str, typer.Option(help="inside: the question is in the prompt; after: in a second turn, behind what was kept.")
    ] = "inside,after",
    length: Annotated[int, typer.Option(help="Tokens of each context with its question.", min=1)] = 1024,
    instances: Annotated[int, typer.Option(help="Examples of each task.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", min=0)] = 0,
    quantized: Annotated[
        str | None, typer.Option(help="transformers' quantized caches: int8, int4, fp8; by default those installed.")
    ] = None,
    backend: Annotated[str, typer.Option(help="eager or inductor, which compiles every plan.")] = "eager",
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON here, its tables beside it.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Write pictures into this folder.")] = None,
    smallest: Annotated[
        bool, typer.Option(help="Also find the smallest shares that are enough: by needles, and by held-out KL.")
    ] = False,
    kl: Annotated[float, typer.Option(help="The bound that --smallest holds.")] = 0.02,
    json_: Json = False,
) -> None:
    """Put tasks to the full cache and to plans of equal bytes. Goes on where it was interrupted, if given --out."""
    from xkv_fx.evaluation import command
    from xkv_fx.evaluation.evaluate import Settings, remove_parts
    from xkv_fx.evaluation.results import CONTINUATION
    from xkv_fx.evaluation.tasks import task_names

    named = (*task_names(), CONTINUATION) if tasks is None else command.names(tasks)
    request = command.Request(
        plans=tuple(plans or ()),
        measured=tuple(measured or ()),
        allocators=None if allocators is None else command.names(allocators),
        fractions=command.numbers(fractions),
        scorers=command.names(scorers),
        quantized=None if quantized is None else command.names(quantized),
        settings=Settings(named, command.names(forms), length, instances, seed),
        backend=backend,
    )
    loaded, tokenizer = _load(model)
    parts = None if out is None else out.with_name(f"{out.name}.parts")
    extra: dict[str, Any] = {}
    try:
        with _progress("eval") as advance:
            found = command.run(loaded, tokenizer, request, parts, advance)
        if smallest:
            with _progress("smallest") as advance:
                extra = {"smallest": command.smallest(loaded, tokenizer, request, found, kl, progress=advance)}
    except KeyboardInterrupt:
        kept = (
            "" if parts is None else f"; what was measured is kept in {parts}, and the same command goes on from there"
        )
        _errors.print(f"interrupted{kept}", markup=False)
        raise typer.Exit(130) from None
    if pictures is not None:
        command.draw(found, request, pictures)
    if out is not None:
        command.write(found, out, extra)
        remove_parts(out.with_name(f"{out.name}.parts"))
    if json_:
        _show({**found.to_dict(), **extra}, True)
    else:
        print(found.as_markdown())
        for name, value in extra.items():
            print(f"{name}: {json.dumps(value)}")


@app.command()
def bench(
    model: Model = "smollm2",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    context: Annotated[int, typer.Option(help="Tokens that every row has seen.", min=1)] = 4096,
    batch: Annotated[int, typer.Option(help="Rows.", min=1)] = 1,
    fraction: Annotated[float, typer.Option(help="Share of the context that every layer keeps.")] = 0.384,
    budgets: Annotated[Path | None, typer.Option(help="A budgets file, instead of --fraction.")] = None,
    rounds: Annotated[int, typer.Option(help="How often the contestants take turns.", min=1)] = 5,
    new_tokens: Annotated[int, typer.Option(help="Tokens that each decodes in a round.", min=1)] = 8,
    only: Annotated[str | None, typer.Option(help="Contestants, between commas; all by default.")] = None,
    backend: Annotated[str, typer.Option(help="Of ours: inductor or eager.")] = "inductor",
    prefill: Annotated[
        bool | None,
        typer.Option(help="Feed real prompts, or fill caches directly; by default prompts if they are short."),
    ] = None,
    kvpress_python: Annotated[Path | None, typer.Option(help="The Python that has kvpress.")] = None,
    openvino_python: Annotated[Path | None, typer.Option(help="The Python that has openvino-genai.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the steps here (.png, .svg, .pdf).")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON here.")] = None,
    json_: Json = False,
) -> None:
    """Measure our decode beside transformers' caches and other engines, in turns."""
    from xkv_fx.evaluation.bench_command import bench_model

    names = tuple(name.strip() for name in (only or "").split(",") if name.strip())
    pythons = {"kvpress": kvpress_python, "openvino": openvino_python}

    def say(what: str) -> None:
        _errors.print(what, markup=False, highlight=False)

    result = bench_model(
        model,
        dtype,
        device,
        context,
        batch,
        budgets,
        fraction,
        rounds,
        new_tokens,
        names,
        backend,
        prefill,
        pythons,
        say,
    )
    if out is not None:
        write_json(out, result.to_dict())
    if picture is not None:
        result.draw(picture)
    if json_:
        _show(result.to_dict(), True)
        return
    _console.print(result.table())
    for note in result.notes():
        _console.print(note, markup=False, highlight=False, soft_wrap=True)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A budgets file, or an engine's folder.")], json_: Json = False
) -> None:
    """Show a budgets file: capacities, policy, and how it was made; or an engine, and whether it would load here."""
    if path.is_dir():
        _show_engine(path, json_)
    else:
        _show_plan(xkv_fx.Budgets.load(path), json_)


def _verify(
    budgets: xkv_fx.Budgets, texts: list[Path], model: str, length: int | None, continuation: int
) -> xkv_fx.Verification:
    loaded, tokenizer = _load(model)
    rows = _token_rows(texts, tokenizer, None if length is None else length + continuation)
    with _progress("verify") as advance:
        return xkv_fx.verify(loaded, budgets, rows, continuation=continuation, progress=advance)


def _load(name: str) -> tuple[Any, Any]:
    from xkv_fx.hf.models import load_model

    return load_model(name)


def _read(path: Path | None) -> str:
    return "" if path is None else path.read_text(encoding="utf-8", errors="replace")


def _token_rows(files: list[Path], tokenizer: Any, length: int | None) -> list[list[int]]:
    rows = []
    for file in files:
        ids: list[int] = tokenizer(_read(file))["input_ids"]
        step = len(ids) if length is None else length
        rows += [ids[start : start + step] for start in range(0, max(len(ids) - step, 0) + 1, max(step, 1))]
    return rows


@contextmanager
def _progress(what: str) -> Iterator[Any]:
    with Progress(console=_errors) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        _console.print(f"{name:16} {value}", markup=False, highlight=False)


def _show_engine(folder: Path, as_json: bool) -> None:
    from xkv_fx.lowering.engine_files import inspect_engine

    found = inspect_engine(folder)
    if as_json:
        print(json.dumps(found))
        return
    table = Table("layer", "capacity", "slots")
    for layer, (capacity, slots) in enumerate(zip(found.pop("capacities"), found.pop("slots"), strict=True)):
        table.add_row(str(layer), str(capacity), str(slots))
    checks = {f"check {name}": outcome for name, outcome in found.pop("checks").items()}
    _show({**found, **checks}, False)
    _console.print(table)


def _show_plan(budgets: xkv_fx.Budgets, as_json: bool) -> None:
    result = {
        "capacities": list(budgets.capacities),
        "total_tokens": budgets.total_tokens,
        "policy": budgets.policy.to_dict(),
        "provenance": budgets.provenance.to_dict(),
    }
    if as_json:
        print(json.dumps(result))
        return
    _show({"total_tokens": budgets.total_tokens, **budgets.policy.to_dict(), **budgets.provenance.to_dict()}, False)
    table = Table("layer", "capacity", "recent")
    for layer, capacity in enumerate(budgets.capacities):
        table.add_row(str(layer), str(capacity), str(budgets.policy.recent_for(capacity)))
    _console.print(table)


if __name__ == "__main__":
    main()
