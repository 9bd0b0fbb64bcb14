"""Calling the regions of a graph in a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xkv_fx.lowering.regions import RegionCall, Regions

Compiled = Callable[..., Sequence[Any]]
"""Takes the inputs of a region, returns its results."""


def in_a_row(regions: Regions[Compiled]) -> Callable[..., Tensor]:
    """What takes the inputs of a graph and returns its tensor, by code of its regions. No result is held longer than it
    is needed, and no gradient is recorded."""
    calls = [(regions.made[call.region], call) for call in regions.calls]
    if len(calls) == 1:
        return _alone(*regions.made)
    output = regions.output

    def run(*inputs: Tensor) -> Tensor:
        values: list[Any] = list(inputs)
        with torch.no_grad():
            for function, call in calls:
                _call(function, call, values)
        result: Tensor = values[output]
        return result

    return run


def _call(function: Compiled, call: RegionCall, values: list[Any]) -> None:
    values += function(*[values[number] for number in call.takes])
    for number in call.drops:
        values[number] = None


def _alone(function: Compiled) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = function(*inputs)[0]
        return result

    return run
