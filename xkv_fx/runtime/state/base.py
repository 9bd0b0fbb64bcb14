"""What a kind of state says about itself, and the interface through which it adds its part to a graph."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.runtime.form import AttentionForm
from xkv_fx.runtime.scorers import Scorer

Value = Any
"""A node of the graph that is built; a tensor once it runs."""

GraphKind = Literal["prefill", "extend", "decode"]
"""The graphs of a program: a first prompt, more tokens behind what is held, one token."""
GRAPH_KINDS: tuple[GraphKind, ...] = get_args(GraphKind)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One tensor of a state. A session owns it; graphs take it as an input and change it in place.

    Attributes:
        name: its name among all buffers of a program.
        field: its name within its state.
        shape: batch rows first.
        dtype: of its elements.
        holds: `"kv"` for keys and values, `"recurrent"` for the state of layers that have none, `"other"` for
            positions, scores and counters; their bytes are counted apart.
        reset: what a row of it becomes when its tokens are forgotten: `"zero"`, `"count"` (0, 1, 2, ... along the last
            dimension), or `"stale"` (what it was: nobody reads it before it is written again).
    """

    name: str
    field: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    holds: Literal["kv", "recurrent", "other"] = "other"
    reset: Literal["zero", "count", "stale"] = "zero"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def allocate(self, device: torch.device) -> Tensor:
        """The buffer before any token: even a stale one is zeroed, since a masked slot must hold finite numbers."""
        tensor = torch.zeros(self.shape, dtype=self.dtype, device=device)
        self.forget(tensor, slice(None))
        return tensor

    def forget(self, tensor: Tensor, rows: slice | list[int]) -> None:
        """Make rows of a tensor what `reset` says."""
        if self.reset == "zero":
            tensor[rows] = 0
        elif self.reset == "count":
            tensor[rows] = torch.arange(self.shape[-1], dtype=self.dtype, device=tensor.device)


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that is compiled into the graphs of a state, all of which share it.

    Attributes:
        name: its name among all constants of a program.
        field: its name within its state, by which ops take it.
        value: the tensor.
    """

    name: str
    field: str
    value: Tensor


class Attention(Protocol):
    """One attention of a graph, as a state sees it.

    Attributes:
        node: itself.
        index: place of its cache among all caches.
        q, k, v: queries `[rows, query_heads, S, key_dim]`, new keys and values `[rows, kv_heads, S, ...]`.
        form: how it makes its weights.
    """

    @property
    def node(self) -> Value: ...
    @property
    def index(self) -> int: ...
    @property
    def q(self) -> Value: ...
    @property
    def k(self) -> Value: ...
    @property
    def v(self) -> Value: ...
    @property
    def form(self) -> AttentionForm: ...


class Build(Protocol):
    """Adds to a graph at its insertion point, which whoever calls a state has set.

    Attributes:
        states: all states of the plan.
        scorer: what ranks tokens; in graphs of prompts.
        length: int64 `[rows]`, valid ones among the new tokens; in graphs of prompts.
        fed: the same with those that are read again behind them and not kept, where there are such.
    """

    @property
    def states(self) -> Sequence[LayerState]: ...
    @property
    def scorer(self) -> Scorer: ...
    @property
    def length(self) -> Value: ...
    @property
    def fed(self) -> Value: ...

    def held(self, state: LayerState) -> Mapping[str, Value]:
        """A state's buffers, by field."""
        ...

    def constants(self, state: LayerState) -> Mapping[str, Value]:
        """A state's constants, by field."""
        ...

    def scorer_inputs(self, attention: Attention) -> Mapping[str, Value]:
        """What else the scorer wants to know of an attention."""
        ...

    def emit(self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Value:
        """A call of an op, or of a function that the graph is to call as one."""
        ...

    def inline(self, function: Callable[..., Any], *args: Value, name: str | None = None) -> Value:
        """The aten ops that a function of tensors calls."""
        ...

    def splice(self, part: GraphModule | None, inputs: Sequence[Value], name: str) -> tuple[Value, ...]:
        """The nodes of another graph, with its inputs replaced; returns what stands for its outputs. It shares its
        weights, which are called after `name`."""
        ...

    def once(self, key: object, make: Callable[[], Value]) -> Value:
        """What `make` adds, at the start of the graph and once for all who ask with an equal key."""
        ...


@dataclasses.dataclass(frozen=True)
class LayerState(abc.ABC):
    """What one layer, or a model as a whole, keeps between calls. A method that a kind does not override does nothing.

    Attributes:
        kind: its name, for people.
    """

    kind: ClassVar[str]

    @property
    @abc.abstractmethod
    def buffers(self) -> tuple[Buffer, ...]:
        """Its tensors, in the order in which graphs take them. Session files and engine manifests hold just these."""

    def constants(self, device: torch.device) -> tuple[Constant, ...]:
        """What the plan fixes of it besides shapes."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes of all of its tensors; constants are not the sessions'."""
        return sum(buffer.nbytes for buffer in self.buffers)

    # What graphs do to it

    def prefill(self, build: Build, attention: Attention) -> None:
        """Keep what should stay of a first prompt, after its attention, which needs nothing from the state."""
        return None

    def extend(self, build: Build, attention: Attention) -> Value:
        """The attention of more tokens to what is held and to themselves; its output replaces that of the original."""
        return self._unread(attention)

    def keep(self, build: Build, attention: Attention) -> None:
        """Choose anew among what is held and more tokens, once every attention that reads the state has done so."""
        return None

    def decode(self, build: Build, attention: Attention) -> Value:
        """Write one token and attend to what is held; the output stands in the place of the attention's own."""
        return self._unread(attention)

    def finish(self, build: Build, kind: GraphKind) -> None:
        """What is done at the end of a graph."""
        return None

    def _unread(self, attention: Attention) -> Value:
        raise TypeError(f"attention {attention.index} reads a state of the kind {self.kind!r}, which holds no keys")

    # What a session must know

    def refuse_tokens(self, tokens: int) -> None:
        """Raise CapacityError unless a prompt or a turn may bring a row to so many tokens."""
        return None

    def steps_left(self, seen: int, base: int) -> int | None:
        """How many more tokens a row may decode that has seen `seen`, `base` of them by its last prompt or turn; None
        for any number."""
        return None

    def refuse_step(self) -> None:
        """Raise CapacityError, saying why no further token can be decoded, where `steps_left` is 0."""
        return None

    def problem(self, held: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> str | None:
        """Why tensors read from a file cannot be this state's, though shapes and dtypes fit; None if they can.

        Args:
            held: its own, by field.
            counts: those of `CountersState`.
        """
        return None
