"""What a pass is: a graph goes in, the same graph comes out changed, and a record says what was done."""

from __future__ import annotations

import dataclasses
import time
from typing import ClassVar

from torch.fx import GraphModule, Node

from xkv_fx.errors import PassError
from xkv_fx.passes.tools.graph import open_sizes
from xkv_fx.passes.tools.roles import role_of


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name: the pass.
        matched: nodes that it looked for and found.
        changed: nodes that it added, replaced or removed.
        note: anything a reader of `describe()` should know.
        seconds: how long it took; no part of what it did.
    """

    name: str
    matched: int
    changed: int
    note: str = ""
    seconds: float = dataclasses.field(default=0.0, compare=False)


def _is_needed(node: Node) -> bool:
    """Whether a node stays although nothing reads it: a later pass may look for its role."""
    return node.is_impure() or role_of(node) is not None


@dataclasses.dataclass(frozen=True)
class GraphPass:
    """Base of all passes. A subclass sets `name`, implements `run`, and states in its docstring what must hold before
    and after; cleaning up is done here."""

    name: ClassVar[str] = ""

    def run(self, module: GraphModule) -> PassRecord:
        """Change `module.graph` in place."""
        raise PassError(f"the pass {type(self).__name__} does not implement run()")

    def rewrite(self, module: GraphModule) -> PassRecord:
        """Run on `module.graph` and clean it up; the module computes what it did before until it is recompiled.

        Raises:
            PassError: a size of an input was open and is a number now, so that the graph would be wrong for others.
        """
        started = time.perf_counter()
        before = open_sizes(module.graph)
        record = self.run(module)
        if fixed := sorted(before - open_sizes(module.graph)):
            raise PassError(f"the pass {self.name!r} fixed dimension {fixed[0][1]} of the input {fixed[0][0]!r}")
        module.graph.eliminate_dead_code(_is_needed)
        module.graph.lint()
        return dataclasses.replace(record, seconds=time.perf_counter() - started)

    def __call__(self, module: GraphModule) -> PassRecord:
        record = self.rewrite(module)
        module.recompile()
        return record
