"""Commands that compare: `eval` what plans answer, `bench` how fast they decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from xkv_fx.cli.common import (
    BACKEND_NAMES,
    Json,
    app,
    console,
    errors,
    interruptible,
    names,
    out_file,
    pairs,
    progress,
    shares,
    show,
    span,
)
from xkv_fx.cli.model_options import THE_MODEL, ModelOptions, with_model
from xkv_fx.files import write_json
from xkv_fx.planning.data.load_measured import load_measured
from xkv_fx.sizes import check_share, number_or_word, share_of


@app.command("eval")
@with_model
def eval_(
    plans: Annotated[list[Path] | None, typer.Option(help="Budgets files; may be given repeatedly.")] = None,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Profiles and calibrations to solve plans from; may be given repeatedly.")
    ] = None,
    model: ModelOptions = THE_MODEL,
    allocators: Annotated[
        str | None,
        typer.Option(help="Names between commas, joint for a calibration of formats; by default each file's own."),
    ] = None,
    fractions: Annotated[
        str, typer.Option(help="Shares of the full cache's bytes, such as 0.25 or 25%, between commas.")
    ] = "0.125,0.25,0.384,0.5",
    scorers: Annotated[str, typer.Option(help="Further scorers, with uniform plans, between commas.")] = "",
    formats: Annotated[
        str | None,
        typer.Option(
            help="Plans that store all layers alike, such as int8,int8/int4,int4; by default those calibrated."
        ),
    ] = None,
    bytes_of: Annotated[
        str, typer.Option(help="The dtype that bytes are counted in, whatever the model computes in.")
    ] = "bfloat16",
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
    kvpress_python: Annotated[Path | None, typer.Option(help="The Python that has kvpress, to ask it too.")] = None,
    presses: Annotated[str, typer.Option(help="kvpress's, between commas: snapkv, kvzip, adakv.")] = "snapkv,adakv",
    backend: Annotated[str, typer.Option(help=f"{BACKEND_NAMES}; inductor compiles every plan.")] = "eager",
    out: Annotated[Path | None, out_file("Write the result as JSON here, its tables beside it.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Write pictures into this folder.")] = None,
    smallest: Annotated[
        bool, typer.Option(help="Also find the smallest shares that are enough: by needles, and by held-out KL.")
    ] = False,
    kl: Annotated[float, typer.Option(help="The bound that --smallest holds.")] = 0.02,
    json_: Json = False,
) -> None:
    """Put tasks to the full cache and to plans of equal bytes. Goes on where it was interrupted, if given --out."""
    from xkv_fx.evaluation.dtypes import dtype_of
    from xkv_fx.evaluation.quality import command
    from xkv_fx.evaluation.quality.evaluate import EvaluationSettings
    from xkv_fx.evaluation.quality.kvpress import Kvpress
    from xkv_fx.evaluation.quality.parts import remove_parts
    from xkv_fx.evaluation.quality.results import CONTINUATION_TASK
    from xkv_fx.evaluation.speed.bench_command import place_of
    from xkv_fx.evaluation.tasks import task_names

    named = (*task_names(), CONTINUATION_TASK) if tasks is None else names(tasks)
    kvpress = None
    if kvpress_python is not None:
        folder, gguf = place_of(model.model)
        kvpress = Kvpress(kvpress_python, folder, gguf, shares(fractions), names(presses))
    request = command.Request(
        plans=tuple(plans or ()),
        measured=tuple(load_measured(path) for path in measured or ()),
        allocators=None if allocators is None else names(allocators),
        fractions=shares(fractions),
        scorers=names(scorers),
        quantized=None if quantized is None else names(quantized),
        settings=EvaluationSettings(named, names(forms), length, instances, seed),
        formats=None if formats is None else pairs(formats),
        dtype=dtype_of(bytes_of),
        backend=backend,
        kvpress=kvpress,
    )
    loaded, tokenizer = model.load()
    parts = None if out is None else out.with_name(f"{out.name}.parts")
    extra: dict[str, Any] = {}
    with interruptible(parts):
        with progress("eval") as advance:
            found = command.run(loaded, tokenizer, request, parts, advance)
        if smallest:
            with progress("smallest") as advance:
                extra = {"smallest": command.smallest(loaded, tokenizer, request, found, kl, progress=advance)}
    if pictures is not None:
        command.draw(found, request, pictures)
    if out is not None and parts is not None:
        command.write(found, out, extra)
        remove_parts(parts)
    if json_:
        show({**found.to_dict(), **extra}, True)
    else:
        print(found.as_markdown())
        for name, value in extra.items():
            print(f"{name}: {json.dumps(value)}")


@app.command()
@with_model
def bench(
    model: ModelOptions = THE_MODEL,
    context: Annotated[int, typer.Option(help="Tokens that every row has seen.", min=1)] = 4096,
    batch: Annotated[int | None, typer.Option(help="Rows; 1, or 8 with --many.", min=1)] = None,
    fraction: Annotated[str, typer.Option(help="Share of the context that every layer keeps, as 38.4%.")] = "0.384",
    budgets: Annotated[Path | None, typer.Option(help="A budgets file, instead of --fraction.")] = None,
    rounds: Annotated[int, typer.Option(help="How often the contestants take turns.", min=1)] = 5,
    new_tokens: Annotated[int, typer.Option(help="Tokens that each decodes in a round.", min=1)] = 8,
    only: Annotated[str | None, typer.Option(help="Contestants, between commas; all by default.")] = None,
    formats: Annotated[
        str, typer.Option(help="Also keep all tokens in each of these, such as int8,int8/int4,int4, between commas.")
    ] = "",
    backend: Annotated[str, typer.Option(help=f"Of ours: {BACKEND_NAMES}.")] = "inductor",
    prefill: Annotated[
        bool | None,
        typer.Option(help="Feed real prompts, or fill caches directly; by default prompts if they are short."),
    ] = None,
    kvpress_python: Annotated[Path | None, typer.Option(help="The Python that has kvpress.")] = None,
    openvino_python: Annotated[Path | None, typer.Option(help="The Python that has openvino-genai.")] = None,
    many: Annotated[
        bool, typer.Option("--many", help="Measure how fast many requests of different lengths are answered.")
    ] = False,
    requests: Annotated[int, typer.Option(help="With --many: how many.", min=1)] = 64,
    prompt_tokens: Annotated[
        str, typer.Option(help="With --many: the fewest and the most tokens of a prompt.", metavar="LEAST,MOST")
    ] = "100,3000",
    answer_tokens: Annotated[
        str, typer.Option(help="With --many: the fewest and the most tokens of an answer.", metavar="LEAST,MOST")
    ] = "16,256",
    picture: Annotated[Path | None, out_file("Draw the steps here (.png, .svg, .pdf).")] = None,
    out: Annotated[Path | None, out_file("Write the result as JSON here.")] = None,
    json_: Json = False,
) -> None:
    """Measure our decode beside transformers' caches and other engines, in turns.

    With --many, the same requests are answered by generate_many, by padded batches of ours and of transformers, and by
    transformers' continuous batching, at equal bytes of K/V. --fraction is then of the longest prompt and answer.
    """
    from xkv_fx.evaluation.speed.bench import BenchSettings, run_bench
    from xkv_fx.evaluation.speed.bench_command import place_of, plan_of

    share = share_of(number_or_word(fraction), "fraction")
    check_share(share, "fraction")
    if many:
        from xkv_fx.evaluation.speed.many_bench import ManySettings, run_many_bench

        prompt, answer = (span(text, name) for text, name in ((prompt_tokens, "prompt"), (answer_tokens, "answer")))
        loaded, _ = model.load()
        plan = plan_of(loaded, budgets, share, prompt[1] + answer[1])
        asked = ManySettings(plan, requests, prompt, answer, batch or 8, names(only or ""), backend)
        answered = run_many_bench(loaded, asked, lambda what: errors.print(what, markup=False, highlight=False))
        if out is not None:
            write_json(out, answered.to_dict())
        if json_:
            show(answered.to_dict(), True)
        else:
            console.print(answered.table())
        return
    loaded, _ = model.load()
    folder, gguf = place_of(model.model)
    pythons = {"kvpress": kvpress_python, "openvino": openvino_python}
    settings = BenchSettings(
        context,
        batch or 1,
        plan_of(loaded, budgets, share, context),
        rounds,
        new_tokens,
        only=names(only or ""),
        backend=backend,
        prefill=prefill,
        pythons={engine: str(python) for engine, python in pythons.items() if python is not None},
        folder=folder,
        gguf=gguf,
        formats=pairs(formats),
    )
    result = run_bench(loaded, settings, lambda what: errors.print(what, markup=False, highlight=False))
    if out is not None:
        write_json(out, result.to_dict())
    if picture is not None:
        result.draw(picture)
    if json_:
        show(result.to_dict(), True)
        return
    console.print(result.table())
    for note in result.notes():
        console.print(note, markup=False, highlight=False, soft_wrap=True)
