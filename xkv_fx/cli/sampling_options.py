"""The options that say how answers are generated."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

PANEL = "Answers"


def _option(help: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=PANEL, **limits)


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; the likeliest ones by default."""

    max_new_tokens: Annotated[int, _option("How many tokens an answer has at most.", min=1)] = 64
    sample: Annotated[bool, _option("Draw tokens, instead of taking the likeliest.", "--sample")] = False
    temperature: Annotated[float, _option("Of the distribution that is drawn from.")] = 1.0
    top_k: Annotated[int | None, _option("Draw from so many of the likeliest tokens.", min=1)] = None
    top_p: Annotated[float | None, _option("Draw from the likeliest tokens that together have this.")] = None
    seed: Annotated[int, _option("Of what is drawn.")] = 0

    def arguments(self) -> dict[str, Any]:
        """As arguments of `generate_many`."""
        options = dataclasses.asdict(self)
        return {"do_sample": options.pop("sample"), **options}


SAMPLING = SamplingOptions()
"""What a command's parameter `sampling` is by default."""
