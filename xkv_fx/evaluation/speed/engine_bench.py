"""What an engine promises, measured: `python -m xkv_fx.evaluation.speed.engine_bench COMMAND ENGINE --model MODEL`.

start   a fresh process to its first token: with the engine; with the model, loaded, transformed and compiled
decode  a decode step of the engine and of the transformed model, in turns
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import xkv_fx
from xkv_fx.evaluation.timing import medians_in_turns, process_seconds

app = typer.Typer(add_completion=False, help="What an engine promises, measured.")
Engine = Annotated[Path, typer.Argument(help="A folder that xkv-fx export wrote.")]
Model = Annotated[str, typer.Option(help="The model that it was made of.")]
Prompt = Annotated[int, typer.Option(help="Tokens in the prompt.")]

_ENGINE = """
import time; start = time.perf_counter()
import sys, torch, xkv_fx
engine = xkv_fx.load(sys.argv[1])
engine.generate(torch.arange(3, 3 + int(sys.argv[3]))[None], 2)
print(time.perf_counter() - start)
"""
_MODEL = """
import time; start = time.perf_counter()
import sys, torch, xkv_fx
from xkv_fx.hf.models import load_model
from xkv_fx.engines.manifest import Manifest
from pathlib import Path
model, _ = load_model(sys.argv[2])
llm = xkv_fx.transform(model, Manifest.load(Path(sys.argv[1])).budgets)
ids = torch.arange(3, 3 + int(sys.argv[3]))[None]
llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
print(time.perf_counter() - start)
"""


@app.command()
def start(engine: Engine, model: Model = "smollm2", prompt: Prompt = 128, repeats: int = 3) -> None:
    """Seconds from the start of a process to its second token, and of the processors, in turns; nothing compiled before
    is found again."""
    programs = {"engine": _ENGINE, "model": _MODEL}
    runs = [
        {name: _seconds(program, engine, model, prompt) for name, program in programs.items()} for _ in range(repeats)
    ]
    result: dict[str, dict[str, float]] = {}
    for what in ("seconds", "processor_seconds"):
        medians = {name: statistics.median(run[name][what] for run in runs) for name in programs}
        result[what] = {**medians, "times_faster": medians["model"] / medians["engine"]}
    print(json.dumps(result))


def _seconds(program: str, engine: Path, model: str, prompt: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as nothing:
        return process_seconds(program, engine, model, prompt, compiled=nothing)


@app.command()
def decode(engine: Engine, model: Model = "smollm2", prompt: Prompt = 128, steps: int = 50) -> None:
    """Milliseconds of a decode step, the median over steps taken in turns."""
    from xkv_fx.hf.models import load_model

    loaded = xkv_fx.load(engine)
    llm = xkv_fx.transform(load_model(model)[0], loaded.budgets)
    ids = torch.arange(3, 3 + prompt)[None]
    sessions: dict[str, Any] = {"engine": loaded.new_session(), "model": llm.new_session().session}
    for session in sessions.values():
        session.feed(ids)
    medians = medians_in_turns(
        {name: functools.partial(session.step, ids[:, :1]) for name, session in sessions.items()}, steps
    )
    print(json.dumps({**medians, "engine_over_model": medians["engine"] / medians["model"]}))


if __name__ == "__main__":
    app()
