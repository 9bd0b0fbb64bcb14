"""How many tokens each row has seen: what slots, masks and positions follow from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from xkv_fx.runtime.state.base import Buffer, Build, GraphKind, LayerState

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class CountersState(LayerState):
    """`seen`, the valid tokens of each row, and `base`, the same count when the last prompt or turn ended.

    Graphs count for themselves; `runtime.history` has the same numbers where Python needs them.

    Attributes:
        rows: batch rows.
    """

    kind: ClassVar[str] = "counters"
    rows: int

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return tuple(Buffer(name, name, (self.rows,), torch.int64) for name in ("seen", "base"))

    def finish(self, build: Build, kind: GraphKind) -> None:
        held = build.held(self)
        if kind == "decode":
            build.emit(aten.add_.Tensor, held["seen"], 1)
            return
        seen = base = build.length
        if kind == "extend":
            seen, base = build.inline(_extended, held["seen"], held["base"], build.length)
        build.emit(aten.copy_.default, held["seen"], seen)
        build.emit(aten.copy_.default, held["base"], base)

    def problem(self, held: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> str | None:
        wrong = bool((held["base"] < 0).any() or (held["base"] > held["seen"]).any())
        return "its counters contradict each other" if wrong else None


def _extended(seen: Tensor, base: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    return seen + length, torch.where(length > 0, seen + length, base)
