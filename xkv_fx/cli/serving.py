"""Commands that generate with a plan, and write and show what serves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import xkv_fx
from xkv_fx.cli.common import (
    BACKEND_NAMES,
    Json,
    Plan,
    app,
    console,
    read,
    show,
    show_measured,
    show_plan,
    text_file,
)
from xkv_fx.cli.model_options import THE_MODEL, ModelOptions, transform, with_model
from xkv_fx.engines.targets import TARGETS
from xkv_fx.errors import BudgetError, EngineError, PromptError
from xkv_fx.file_kinds import kind_of_file
from xkv_fx.planning.data.load_measured import MEASURED, load_measured

OverLimit = Annotated[bool, typer.Option("--over-limit", help="Allow more bytes than the plan was solved for.")]


@app.command()
@with_model
def generate(
    plan: Annotated[Path | None, typer.Argument(help="A budgets file; none with --engine.")] = None,
    engine: Annotated[Path | None, typer.Option(help="A folder that xkv-fx export wrote, in place of a plan.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, text_file("A text file with the prompt.")] = None,
    model: ModelOptions = THE_MODEL,
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to generate.", min=1)] = 64,
    backend: Annotated[str, typer.Option(help=f"{BACKEND_NAMES}.")] = "inductor",
    trust: Annotated[bool, typer.Option(help="Take an engine of the target pt2, which is read with pickle.")] = False,
    over_limit: OverLimit = False,
    json_: Json = False,
) -> None:
    """Generate with a plan's budgets or with an engine, greedily."""
    if (prompt is None) == (prompt_file is None):
        raise PromptError("give either --prompt or --prompt-file")
    text = prompt if prompt is not None else read(prompt_file)
    llm: Any
    if engine is not None and plan is None:
        from xkv_fx.hf.models import load_tokenizer

        llm = xkv_fx.load(engine, trust=trust)
        tokenizer: Any = load_tokenizer(engine / "tokenizer")
        ids = tokenizer(text, return_tensors="pt")
        output = llm.generate(ids["input_ids"], max_new_tokens)
    elif plan is not None and engine is None:
        budgets = xkv_fx.Budgets.load(plan)
        loaded, tokenizer = model.load()
        ids = tokenizer(text, return_tensors="pt")
        llm = transform(loaded, budgets, backend=backend, max_new_tokens=max_new_tokens, over_limit=over_limit)
        output = llm.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False)
    else:
        raise BudgetError("give either a budgets file or --engine")
    answer = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    if json_:
        show({"text": answer, "prompt_tokens": ids["input_ids"].shape[1], "kv_bytes": llm.kv_bytes}, True)
    else:
        console.print(answer, markup=False, highlight=False)


@app.command()
@with_model
def export(
    plan: Plan,
    out: Annotated[Path, typer.Option(help="The engine's folder, a new one.")],
    model: ModelOptions = THE_MODEL,
    target: Annotated[
        str,
        typer.Option(help="; ".join(f"{name}: {target.summary}" for name, target in TARGETS.items()) + "."),
    ] = "aoti",
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.", min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Room for generated tokens under append.", min=0)] = 0,
    over_limit: OverLimit = False,
    json_: Json = False,
) -> None:
    """Write an engine: a folder that generates without transformers, the model's code, or a compiler."""
    check_new_folder(out)
    budgets = xkv_fx.Budgets.load(plan)
    loaded, tokenizer = model.load()
    if target in TARGETS and "cpu" not in TARGETS[target].devices:
        import torch

        if torch.cuda.is_available():  # where there is none, export says so
            loaded.to("cuda")
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "over_limit": over_limit}
    llm = transform(loaded, budgets, backend="eager", **options)
    xkv_fx.export(llm, out, target=target, tokenizer=tokenizer)
    show_engine(out, json_)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A budgets file, a profile, a calibration, or an engine's folder.")],
    json_: Json = False,
) -> None:
    """Show a plan and how it was made, what was measured, or an engine and whether it would load here."""
    if path.is_dir():
        show_engine(path, json_)
    elif path.exists() and kind_of_file(path) in MEASURED:
        show_measured(load_measured(path), json_, path)
    else:
        show_plan(xkv_fx.Budgets.load(path), json_, path)


def check_new_folder(path: Path) -> None:
    """Refuse, before anything is loaded, a folder that export would refuse."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise EngineError(f"{path} exists; remove it, or choose another folder")


def show_engine(folder: Path, as_json: bool) -> None:
    from xkv_fx.engines.folder import inspect_engine

    found = inspect_engine(folder)
    if as_json:
        print(json.dumps(found))
        return
    table = Table("layer", "capacity", "slots")
    for layer, (capacity, slots) in enumerate(zip(found.pop("capacities"), found.pop("slots"), strict=True)):
        table.add_row(str(layer), str(capacity), str(slots))
    checks = {f"check {name}": outcome for name, outcome in found.pop("checks").items()}
    show({**found, **checks}, False)
    console.print(table)
