"""The options that say which model a command is about, and how it is loaded."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import xkv_fx
from xkv_fx.cli.common import errors

PANEL = "Model"


def _option(help: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=PANEL, **limits)


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """A model by name, and how it is to be loaded. `with_model` makes the fields options of a command."""

    model: Annotated[
        str, _option("A model folder, a .gguf file, a name on the Hub (owner/name), or the alias smollm2.")
    ] = "smollm2"
    dtype: Annotated[str, _option("float32, bfloat16 or float16.")] = "float32"
    device: Annotated[str, _option("cpu, cuda, or one of several, such as cuda:1.")] = "cpu"
    threads: Annotated[int | None, _option("Threads of the CPU; torch's own number by default.", min=1)] = None
    trust_remote_code: Annotated[
        bool, _option("Run code that comes with the model. It may do anything that you may.", "--trust-remote-code")
    ] = False
    revision: Annotated[str | None, _option("Branch, tag or commit of a model on the Hub.")] = None

    def load(self) -> tuple[Any, Any]:
        """The model, ready for evaluation, and its tokenizer.

        Raises:
            UnsupportedModelError: nothing of that name, or it could not be loaded.
            BackendError: an unknown dtype or device.
        """
        from xkv_fx.evaluation.dtypes import dtype_of
        from xkv_fx.hf.models import device_named, load_model

        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        chosen: dict[str, Any] = {
            "dtype": dtype_of(self.dtype),
            "device": device_named(self.device),
            "trust_remote_code": self.trust_remote_code,
            "revision": self.revision,
        }
        default = ModelOptions()
        said = {name: value for name, value in chosen.items() if getattr(self, name) != getattr(default, name)}
        with steps() as step:
            step(f"loading {self.model}")
            return load_model(self.model, **said)


THE_MODEL = ModelOptions()
"""What a command's parameter `model` is by default."""


def with_options(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command all fields of a dataclass as options, in place of its parameter of the group's name, which it gets
    as one object."""

    def give(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in signature.parameters.items():
            fields = inspect.signature(groups[name], eval_str=True).parameters if name in groups else {}
            parameters += fields.values() or (parameter,)

        @functools.wraps(command)
        def run(**given: Any) -> None:
            made = {}
            for name, group in groups.items():
                made[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            command(**given, **made)

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return give


with_model = with_options(model=ModelOptions)
"""Give a command the options of `ModelOptions` in place of its parameter `model`."""


@contextmanager
def steps(shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done, and for how long: call what this gives with the name of each step.

    A spinner on a terminal, and elsewhere a line for each step that took more than a second.
    """
    if not shown:
        yield lambda what: None
        return
    if errors.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=errors, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda what: bar.reset(task, description=what)
        return
    running: list[tuple[str, float]] = []

    def end() -> None:
        for what, start in running:
            seconds = perf_counter() - start
            if seconds > 1:
                errors.print(f"{what}: {seconds:.1f} s", markup=False, highlight=False, soft_wrap=True)
        running.clear()

    def step(what: str) -> None:
        end()
        running.append((what, perf_counter()))

    yield step
    end()


def transform(model: Any, budgets: Any, **options: Any) -> Any:
    """`xkv_fx.transform`, which shows its steps."""
    with steps() as step:
        return xkv_fx.transform(model, budgets, progress=step, **options)
