"""The tensors that a session owns and the graphs change in place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from torch import Tensor

from xkv_fx.runtime.state.base import Buffer, LayerState


@dataclasses.dataclass(frozen=True)
class State:
    """The tensors of one session.

    Attributes:
        states: what they belong to.
        tensors: one for each buffer of these, in order.
    """

    states: tuple[LayerState, ...]
    tensors: tuple[Tensor, ...]

    def of(self, state: LayerState) -> dict[str, Tensor]:
        """The tensors of one state, by field."""
        return {buffer.field: self[buffer.name] for buffer in state.buffers}

    def __getitem__(self, name: str) -> Tensor:
        return self._by_name[name]

    @functools.cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        """What each tensor is."""
        return tuple(buffer for state in self.states for buffer in state.buffers)

    @functools.cached_property
    def _by_name(self) -> dict[str, Tensor]:
        return {buffer.name: tensor for buffer, tensor in zip(self.buffers, self.tensors, strict=True)}

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, counted from the tensors themselves."""
        return self._bytes("kv")

    @property
    def other_state_bytes(self) -> int:
        """Bytes of the states of layers that keep no keys and values."""
        return self._bytes("recurrent")

    @property
    def state_bytes(self) -> int:
        """Bytes of everything else: positions, scores and counters."""
        return self._bytes("other")

    def _bytes(self, holds: str) -> int:
        pairs = zip(self.buffers, self.tensors, strict=True)
        return sum(tensor.untyped_storage().nbytes() for buffer, tensor in pairs if buffer.holds == holds)

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget every token, or those of some rows. Buffers stay where they are, so that graphs stay valid."""
        chosen = slice(None) if rows is None else list(rows)
        for buffer, tensor in zip(self.buffers, self.tensors, strict=True):
            buffer.forget(tensor, chosen)

    def take_row(self, row: int, other: State) -> None:
        """Make a row what the only row of another state is, whose buffers are the same but for the number of rows."""
        for tensor, content in zip(self.tensors, other.tensors, strict=True):
            tensor[row].copy_(content[0])

    def clone(self) -> State:
        """An independent copy."""
        return State(self.states, tuple(tensor.clone() for tensor in self.tensors))

    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row `rows[i]`, as beam search does."""
        for tensor in self.tensors:
            tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))
