"""What a recurrent, linear-attention or convolution layer keeps of earlier tokens: tensors of fixed size."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch

from xkv_fx.runtime.recurrence import PromptCall, Recurrence, StatePart
from xkv_fx.runtime.state.base import Buffer, Build, GraphKind, LayerState, Value

aten = torch.ops.aten


class RecurrenceSite(Protocol):
    """One such layer in a graph, as its state sees it: the layer, and the nodes that it is given."""

    @property
    def recurrence(self) -> Recurrence: ...
    @property
    def inputs(self) -> Sequence[Value]: ...


@dataclasses.dataclass(frozen=True)
class RecurrentState(LayerState):
    """Its size depends on no token, so no budget does: it is carried along, and nothing is evicted.

    Attributes:
        index: place among the layers of this kind.
        parts: its tensors, those of one row.
        rows: batch rows.
    """

    kind: ClassVar[str] = "recurrent state"
    index: int
    parts: tuple[StatePart, ...]
    rows: int

    @functools.cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        return tuple(
            Buffer(f"{part.field}_{self.index}", part.field, (self.rows, *part.shape), part.dtype, holds="recurrent")
            for part in self.parts
        )

    def carried(self, build: Build, site: RecurrenceSite, kind: GraphKind) -> Value:
        """The layer's output in a graph of that kind, which also updates the state to what it is after the tokens."""
        recurrence, held = site.recurrence, tuple(build.held(self).values())
        name = f"recurrence_{self.index}"
        if kind != "decode":
            run = PromptCall(recurrence, fresh=kind == "prefill")
            return build.emit(run, build.length, build.fed, *site.inputs, *held, name=name)
        out, *states = build.splice(recurrence.step, (*site.inputs, *held), name)
        for state, new in zip(held, states, strict=True):
            build.emit(aten.copy_.default, state, new)
        return out
