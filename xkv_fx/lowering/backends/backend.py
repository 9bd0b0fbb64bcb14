"""What a backend is, and what it makes of a decode graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.lowering.kernels.kernel import Choice


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A graph that runs.

    Attributes:
        run: takes the graph's inputs and returns the logits.
        choices: which kernel serves which call of the graph, where kernels were chosen.
        parts: in how many it runs.
        made: how many of them are different, and were compiled.
    """

    run: Callable[..., Tensor]
    choices: tuple[Choice, ...] = ()
    parts: int = 1
    made: int = 1


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way of making a decode graph run.

    Attributes:
        lower: makes a graph run, which holds its weights or takes them as its first inputs, and is not changed. Raises
            BackendError where it cannot.
        describe: what `lower` has made, and who serves its attention, for people.
    """

    lower: Callable[[GraphModule], Lowered]
    describe: Callable[[Lowered], str]
