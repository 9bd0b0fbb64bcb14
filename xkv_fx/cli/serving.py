"""Commands that generate with a plan, and write and show what serves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import xkv_fx
from xkv_fx.cli.answering import answer_into, answers_to, record_of, requests_of, shared_prefix
from xkv_fx.cli.common import (
    BACKEND_NAMES,
    Json,
    OverLimit,
    Plan,
    app,
    console,
    out_file,
    read,
    show,
    text_file,
)
from xkv_fx.cli.model_options import THE_MODEL, ModelOptions, transform, with_model, with_options
from xkv_fx.cli.requests_file import AskedLine, read_requests
from xkv_fx.cli.sampling_options import SAMPLING, SamplingOptions
from xkv_fx.cli.showing import show_measured, show_plan
from xkv_fx.engines.targets import TARGETS
from xkv_fx.errors import BudgetError, EngineError, PromptError
from xkv_fx.file_kinds import kind_of_file
from xkv_fx.planning.data.load_measured import MEASURED, load_measured


@app.command()
@with_options(model=ModelOptions, sampling=SamplingOptions)
def generate(
    plan: Annotated[Path | None, typer.Argument(help="A budgets file; none with --engine.")] = None,
    engine: Annotated[Path | None, typer.Option(help="A folder that xkv-fx export wrote, in place of a plan.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[
        list[Path] | None, text_file("A text file, a prompt as a whole; may be given repeatedly; - for standard input.")
    ] = None,
    prompts: Annotated[
        Path | None,
        text_file('JSON lines, each a string or an object with "prompt" or "messages"; - for standard input.'),
    ] = None,
    out: Annotated[
        Path | None, out_file("Write answers to this file, as JSON lines; goes on where it was interrupted.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the tokenizer's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="What is said before each chat.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends an answer; may be repeated.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Requests answered at the same time; what the plan is for, or 8.", min=1)
    ] = None,
    share_prefix: Annotated[
        bool, typer.Option("--share-prefix", help="Feed what all prompts begin with only once.")
    ] = False,
    prefill_chunk_size: Annotated[
        int | None, typer.Option(help="Feed prompts so many tokens at a time; whole by default.", min=1)
    ] = None,
    sampling: SamplingOptions = SAMPLING,
    model: ModelOptions = THE_MODEL,
    backend: Annotated[str, typer.Option(help=f"{BACKEND_NAMES}.")] = "inductor",
    trust: Annotated[bool, typer.Option(help="Take an engine of the target pt2, which is read with pickle.")] = False,
    over_limit: OverLimit = False,
    json_: Json = False,
) -> None:
    """Answer one prompt or many, with a plan's budgets or with an engine.

    Answers of many prompts are JSON lines, each the one that its prompt gets alone.
    """
    if [prompt is not None, bool(prompt_file), prompts is not None].count(True) != 1:
        raise PromptError("give either --prompt, --prompt-file or --prompts")
    if prompts is not None:
        asked = read_requests(prompts)
    else:
        texts = [prompt] if prompt is not None else [read(path) for path in prompt_file or ()]
        asked = [AskedLine(text, None, {}) for text in texts]
    if (engine is None) == (plan is None):
        raise BudgetError("give either a budgets file or --engine")
    many = len(asked) > 1 or prompts is not None
    if engine is not None:
        given = {
            "--prompts": many, "--out": out, "--chat": chat, "--system": system, "--stop": stop,
            "--sample": sampling.sample, "--share-prefix": share_prefix, "--batch-size": batch_size,
            "--prefill-chunk-size": prefill_chunk_size,
        }  # fmt: skip
        _generate_by_engine(engine, asked, sampling.max_new_tokens, trust, given, json_)
        return
    if system is not None and not chat and all(line.messages is None for line in asked):
        raise PromptError("--system is for chats; give --chat too")
    budgets = xkv_fx.Budgets.load(plan)  # type: ignore[arg-type]  # one of the two is there
    loaded, tokenizer = model.load()
    requests = requests_of(asked, tokenizer, chat, system)
    options: dict[str, Any] = {"stop": stop or [], "prefill_chunk_size": prefill_chunk_size}
    if share_prefix:
        options["prefix"] = shared_prefix(requests, tokenizer)
    rows = min(batch_size or (budgets.provenance.constraint or {}).get("batch_size", 8), len(asked))
    room = max([sampling.max_new_tokens, *(line.settings.get("max_new_tokens", 0) for line in asked)])
    llm = transform(loaded, budgets, batch_size=rows, backend=backend, max_new_tokens=room, over_limit=over_limit)
    if out is not None:
        counts = answer_into(out, llm, tokenizer, asked, requests, sampling, **options)
        show({"out": str(out), **counts, "kv_bytes": llm.kv_bytes}, json_)
        return
    for index, answer in answers_to(llm, tokenizer, requests, range(len(asked)), sampling, True, many, **options):
        if many:
            print(json.dumps({"index": index, **record_of(answer, asked[index])}), flush=True)
        elif answer.error is not None:
            raise answer.error
        elif json_:
            show({"text": answer.text, "prompt_tokens": answer.prompt_tokens, "kv_bytes": llm.kv_bytes}, True)
        else:
            console.print(answer.text, markup=False, highlight=False)


def _generate_by_engine(
    engine: Path, asked: list[AskedLine], max_new_tokens: int, trust: bool, given: dict[str, Any], as_json: bool
) -> None:
    """Answer one prompt greedily."""
    from xkv_fx.hf.models import load_tokenizer

    wrong = [name for name, value in given.items() if value]
    if wrong:
        raise EngineError(f"an engine answers one prompt, greedily; leave {', '.join(wrong)} out, or give a plan")
    llm = xkv_fx.load(engine, trust=trust)
    tokenizer: Any = load_tokenizer(engine / "tokenizer")
    ids = tokenizer(asked[0].prompt, return_tensors="pt")["input_ids"]
    output = llm.generate(ids, max_new_tokens)
    answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    if as_json:
        show({"text": answer, "prompt_tokens": ids.shape[1], "kv_bytes": llm.kv_bytes}, True)
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
