"""What the commands share: their options, loading, progress, and how results are shown."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import xkv_fx
from xkv_fx.errors import BudgetError, MissingFileError, PromptError
from xkv_fx.formats import LayerFormats, formats_of_heads, is_by_head, pair_name, pair_of_name
from xkv_fx.lowering.backends.table import BACKENDS
from xkv_fx.sizes import as_text, number_or_word, share_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from xkv_fx.planning.data.calibration_data import Calibration
    from xkv_fx.planning.data.profile_data import Profile

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Per-layer KV cache budgets: measure, solve, generate, inspect."
)
console = Console()
errors = Console(stderr=True)


def _writable(path: Path | None) -> Path | None:
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; give the name of a file in it")
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}; make it first")
    return path


def out_file(help: str) -> Any:
    """An option for a file that is written at the end: other paths are refused before anything is measured."""
    return typer.Option(help=help, callback=_writable)


STANDARD_INPUT = Path("-")


def _readable(given: Path | list[Path] | None) -> Path | list[Path] | None:
    for path in [given] if isinstance(given, Path) else given or ():
        if path == STANDARD_INPUT:
            continue
        if path.is_dir():
            raise PromptError(f"{path} is a folder; give the name of a text file in it")
        if not path.exists():
            raise MissingFileError(f"there is no file {path}")
        if path.is_file() and path.stat().st_size == 0:
            raise PromptError(f"{path} is empty; give a file with text in it")
    return given


def text_file(help: str) -> Any:
    """An option for files of text: what is not there is refused before a model is loaded."""
    return typer.Option(help=help, callback=_readable)


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OverLimit = Annotated[bool, typer.Option("--over-limit", help="Allow more bytes than the plan was solved for.")]
Plan = Annotated[Path, typer.Argument(help="A budgets file.")]
BACKEND_NAMES = " or ".join(BACKENDS)
"""For the help of commands."""


SPREAD = ("profile", "calibrate")
"""Commands that share their prompts among processes."""


@app.callback()
def one_or_spread(context: typer.Context) -> None:
    if started_processes() > 1 and context.invoked_subcommand not in SPREAD:
        raise BudgetError(
            f"xkv-fx {context.invoked_subcommand} runs in one process; start it without torchrun or accelerate launch, "
            f"which are for {' and '.join(SPREAD)}"
        )


def started_processes() -> int:
    """How many processes `torchrun` or `accelerate launch` started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def processes() -> Iterator[ProcessGroup | None]:
    """The processes that this one was started among, as a group; None if it is alone."""
    if started_processes() < 2:
        yield None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def is_first(group: ProcessGroup | None) -> bool:
    """Whether it is this process that writes and prints."""
    return group is None or group.rank() == 0


@contextmanager
def interruptible(parts: Path | None, what: str = "what was measured") -> Iterator[None]:
    """Let Ctrl-C end the program with one line that says where the work so far is kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "" if parts is None else f"; {what} is kept in {parts}, and the same command goes on from there"
        errors.print(f"interrupted{kept}", markup=False)
        raise typer.Exit(130) from None


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print warnings as lines of ours on standard error, without the place in the source."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        errors.print(f"warning: {warning.message}", style="yellow", markup=False, soft_wrap=True)


def read(path: Path | None) -> str:
    if path == STANDARD_INPUT:
        return sys.stdin.read()
    return "" if path is None else path.read_text(encoding="utf-8", errors="replace")


def shares(text: str) -> tuple[float, ...]:
    """Shares such as 0.25 and 38%, separated by commas.

    Raises:
        BudgetError: something between commas is not one.
    """
    return tuple(share_of(number_or_word(part), "fractions") for part in names(text))


def span(text: str, name: str) -> tuple[int, int]:
    """The fewest and the most, as 100,3000.

    Raises:
        PromptError: something else.
    """
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise PromptError(f"tokens of {name} are given as the fewest and the most, such as 100,3000; got {text!r:.100}")
    return int(parts[0]), int(parts[1])


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def pairs(text: str) -> tuple[LayerFormats, ...]:
    """Formats of keys and values by their names, separated by commas; the model's dtype is left out.

    Raises:
        BudgetError: an unknown name.
    """
    return tuple(pair for pair in map(pair_of_name, names(text)) if pair is not None)


@contextmanager
def progress(what: str, shown: bool = True) -> Iterator[Any]:
    with Progress(console=errors, disable=not shown) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        console.print(f"{name:16} {value}", markup=False, highlight=False, soft_wrap=True)


def summary_of(measured: Profile | Calibration) -> dict[str, Any]:
    return {
        "model": measured.model,
        "layers": len(measured.model_layers),
        **({} if measured.heads is None else {"kv_heads": len(measured.layers)}),
        "prompts": len(measured.lengths),
        "longest": measured.context_default,
    }


def show_measured(measured: Profile | Calibration, as_json: bool, path: Path) -> None:
    if as_json:
        kind = type(measured).__name__.lower()
        print(json.dumps({kind: str(path), **summary_of(measured), "policy": measured.policy.to_dict()}))
    else:
        console.print(f"{path}\n{measured}", markup=False, highlight=False, soft_wrap=True)


def mean_keys_in_words(budgets: xkv_fx.Budgets) -> str | None:
    """Of which layers the plan has mean keys; None without any."""
    if budgets.mean_keys is None:
        return None
    count = sum(mean is not None for mean in budgets.mean_keys)
    return f"of {count} of {len(budgets.mean_keys)} layers, taken off keys in fewer bits"


def show_plan(budgets: xkv_fx.Budgets, as_json: bool, path: Path) -> None:
    made = budgets.provenance
    result = {
        "budgets": str(path),
        "capacities": list(budgets.capacities),
        "total_tokens": budgets.total_tokens,
        "formats": budgets.formats,
        "mean_keys": mean_keys_in_words(budgets),
        "policy": budgets.policy.to_dict(),
        "provenance": made.to_dict(),
    }
    if as_json:
        print(json.dumps(result))
        return
    known = {name: value for name, value in made.to_dict().items() if name not in ("full_kv_bytes", "sliding_windows")}
    if made.kv_bytes is not None and made.full_kv_bytes is not None and made.share is not None:
        full = f"{made.share:.1%} of the {as_text(made.full_kv_bytes)} of a full cache of {made.context:,} tokens"
        known["kv_bytes"] = f"{as_text(made.kv_bytes)} a row, {full}"
    constants = {} if budgets.mean_keys is None else {"mean_keys": mean_keys_in_words(budgets)}
    show(
        {"budgets": path, "total_tokens": budgets.total_tokens, **constants, **budgets.policy.to_dict(), **known}, False
    )
    by_head = ("KV head",) if budgets.by_head else ()
    table = Table("layer", *by_head, "capacity", "recent", *(() if budgets.formats is None else ("formats",)))
    layers = zip(budgets.capacities, budgets.recent, budgets.layer_formats, strict=True)
    for layer, (capacity, recent, formats) in enumerate(layers):
        heads = len(capacity) if isinstance(capacity, tuple) else len(formats) if is_by_head(formats) else 1
        each = zip(_of_heads(capacity, heads), _of_heads(recent, heads), formats_of_heads(formats, heads), strict=True)
        for head, (slots, newest, pair) in enumerate(each):
            place = () if not by_head else ("all",) if heads == 1 else (str(head),)
            stored = () if budgets.formats is None else (pair_name(pair),)
            table.add_row(str(layer), *place, str(slots), str(newest), *stored)
    console.print(table)


def _of_heads(planned: int | tuple[int, ...], heads: int) -> tuple[int, ...]:
    return planned if isinstance(planned, tuple) else (planned,) * heads
