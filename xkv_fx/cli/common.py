"""What the commands share: their options, loading, progress, and how results are shown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import xkv_fx
from xkv_fx.errors import BudgetError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Per-layer KV cache budgets: measure, solve, generate, inspect."
)
console = Console()
errors = Console(stderr=True)

Model = Annotated[str, typer.Option(help="A model folder, a .gguf file, or the alias smollm2.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Plan = Annotated[Path, typer.Argument(help="A budgets file.")]


@contextmanager
def interruptible(parts: Path | None) -> Iterator[None]:
    """Let Ctrl-C end the program in one line that says where what was measured is kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = (
            "" if parts is None else f"; what was measured is kept in {parts}, and the same command goes on from there"
        )
        errors.print(f"interrupted{kept}", markup=False)
        raise typer.Exit(130) from None


def load(name: str) -> tuple[Any, Any]:
    from xkv_fx.hf.models import load_model

    return load_model(name)


def read(path: Path | None) -> str:
    return "" if path is None else path.read_text(encoding="utf-8", errors="replace")


def numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        BudgetError: something that is none.
    """
    try:
        found = tuple(float(part) for part in names(text))
    except ValueError as error:
        raise BudgetError(f"fractions must be numbers between commas; got {text!r}") from error
    if not all(math.isfinite(value) for value in found):
        raise BudgetError(f"fractions must be finite; got {text!r}")
    return found


def names(text: str) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


@contextmanager
def progress(what: str) -> Iterator[Any]:
    with Progress(console=errors) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        console.print(f"{name:16} {value}", markup=False, highlight=False)


def show_plan(budgets: xkv_fx.Budgets, as_json: bool) -> None:
    result = {
        "capacities": list(budgets.capacities),
        "total_tokens": budgets.total_tokens,
        "policy": budgets.policy.to_dict(),
        "provenance": budgets.provenance.to_dict(),
    }
    if as_json:
        print(json.dumps(result))
        return
    show({"total_tokens": budgets.total_tokens, **budgets.policy.to_dict(), **budgets.provenance.to_dict()}, False)
    table = Table("layer", "capacity", "recent")
    for layer, capacity in enumerate(budgets.capacities):
        table.add_row(str(layer), str(capacity), str(budgets.policy.recent_for(capacity)))
    console.print(table)
