"""A layer that mixes tokens by a state of fixed size (recurrent, linear attention, convolution), as graphs call it.

In a captured graph such a layer is one node, as an attention is. Prompts run the layer's own code, for any number of
tokens; a decoded token runs the aten ops of its `step`, which take the node's place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from xkv_fx.errors import PassError


@torch.library.custom_op("xkv::recurrence", mutates_args=())
def recurrence(inputs: Sequence[Tensor], index: int, width: int) -> Tensor:
    """What export leaves in place of such a layer; the pass `BindRecurrences` puts the layer itself in its place.

    Args:
        inputs: `[rows, S, ...]` each.
        index: which of these layers it is, in execution order.

    Returns:
        `[rows, S, width]`.
    """
    raise PassError("the graph still holds layers without their code; the pass that binds them has not run")


@recurrence.register_fake
def _(inputs: Sequence[Tensor], index: int, width: int) -> Tensor:
    rows, tokens = inputs[0].shape[:2]
    return inputs[0].new_empty((rows, tokens, width))


@dataclasses.dataclass(frozen=True)
class StatePart:
    """One tensor of what such a layer keeps of earlier tokens.

    Attributes:
        field: its name within the layer.
        shape: of one row.
        dtype: of its elements.
    """

    field: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Recurrence:
    """A layer that mixes tokens by a state. Called with its inputs alone, `[rows, S, ...]` each, it runs a whole prompt
    without padding from an empty state; outputs are `[rows, S, width]`.

    Attributes:
        index: place among these layers, in execution order.
        path: where the model has it.
        module: called as `(inputs, states)`, states None for an empty one; returns the output, and new states.
        parts: what it keeps.
        width: of its output.
        goes_on: whether `module` takes several tokens behind a state; otherwise they are given to it one by one.
        step: the graph of one token a row, all shapes static: `(*inputs, *states)` -> `(output, *new states)`.
    """

    index: int
    path: str
    module: nn.Module
    parts: tuple[StatePart, ...]
    width: int
    goes_on: bool = True
    step: GraphModule | None = None

    # what a graph needs of a target; see `named_call`
    __name__: ClassVar[str] = "recurrence"
    reads_cache: ClassVar[bool] = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.begin(inputs)[0]

    def fake(self, *inputs: Tensor) -> Tensor:
        """What a call returns, on fake values."""
        rows, tokens = inputs[0].shape[:2]
        return inputs[0].new_empty((rows, tokens, self.width))

    def begin(self, inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output for the first tokens of each row, and the states behind them."""
        out, states = self.module(tuple(inputs), None)
        return out, states

    def go_on(self, inputs: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output for further tokens, and the states behind them; what is given is not changed."""
        tokens, now = inputs[0].shape[1], tuple(states)
        if self.goes_on or tokens == 1:
            out, now = self.module(tuple(inputs), now)
            return out, now
        outs = []
        for token in range(tokens):
            out, now = self.module(tuple(part[:, token : token + 1] for part in inputs), now)
            outs.append(out)
        return torch.cat(outs, 1), now

    def empty_states(self, rows: int, device: torch.device) -> tuple[Tensor, ...]:
        """The states of rows without tokens."""
        return tuple(torch.zeros((rows, *part.shape), dtype=part.dtype, device=device) for part in self.parts)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptCall:
    """What graphs of prompts call for such a layer: `(kept, fed, *inputs, *states)` -> output `[rows, S, width]`, the
    states changed in place.

    `fed` `[rows]` are the valid tokens, which come first in each row; outputs elsewhere are zero. The states end up
    behind the first `kept` of them.

    Attributes:
        recurrence: the layer.
        fresh: whether rows start from nothing; otherwise from the states.
    """

    recurrence: Recurrence
    fresh: bool

    reads_cache: ClassVar[bool] = True

    @property
    def __name__(self) -> str:
        return f"recurrence_{self.recurrence.index}_of_{'prompt' if self.fresh else 'turn'}"

    def __call__(self, kept: Tensor, fed: Tensor, *given: Tensor) -> Tensor:
        inputs, held = self.split(given)
        return self._run(kept, fed, inputs, held)

    def fake(self, kept: Tensor, fed: Tensor, *given: Any) -> Tensor:
        """What a call returns, on fake values."""
        return self.recurrence.fake(*self.split(given)[0])

    def split(self, given: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Inputs and states."""
        count = len(self.recurrence.parts)
        return given[:-count], given[-count:]

    def _run(self, kept: Tensor, fed: Tensor, inputs: Sequence[Tensor], held: Sequence[Tensor]) -> Tensor:
        """Rows of equal lengths go together, so that no row's state sees padding."""
        recurrence, (rows, tokens) = self.recurrence, inputs[0].shape[:2]
        out = inputs[0].new_zeros((rows, tokens, recurrence.width))
        lengths = list(zip(kept.tolist(), fed.tolist(), strict=True))
        if self.fresh:
            for state in held:
                state.zero_()
        for pair in sorted(set(lengths)):
            first, total = pair
            if not first:
                continue
            chosen = torch.tensor([row for row in range(rows) if lengths[row] == pair], device=out.device)
            part = [_rows_of(values, chosen, 0, first) for values in inputs]
            if self.fresh:
                made, states = recurrence.begin(part)
            else:
                made, states = recurrence.go_on(part, [state[chosen] for state in held])
            out[chosen, :first] = made
            for state, new in zip(held, states, strict=True):
                state[chosen] = new
            if total > first:
                again = [_rows_of(values, chosen, first, total) for values in inputs]
                out[chosen, first:total] = recurrence.go_on(again, states)[0]
        return out


def _rows_of(values: Tensor, chosen: Tensor, start: int, stop: int) -> Tensor:
    """Some tokens of some rows; where all rows share what is given, so do these."""
    return values[:, start:stop] if values.shape[0] == 1 else values[chosen, start:stop]
