"""What the commands share: options, files and words that they take, processes, progress, and printing."""

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

from xkv_fx.errors import BudgetError, MissingFileError, PromptError
from xkv_fx.formats import LayerFormats, pair_of_name
from xkv_fx.lowering.backends.table import BACKENDS
from xkv_fx.sizes import number_or_word, share_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
