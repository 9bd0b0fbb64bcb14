"""Running a prompt's graph a layer at a time, so that others need not wait for all of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from xkv_fx.lowering.regions import writes_cache


class RunInParts:
    """A graph that runs on its inputs as far as `advance` takes it; a part ends where a layer has kept its tokens.

    The ops, their order and so the results are those of running the graph at once. What a part leaves to later ones is
    what the graph would hold there.

    Attributes:
        parts: into how many the graph falls.
    """

    def __init__(self, module: GraphModule, inputs: tuple[Tensor, ...]) -> None:
        self.parts = 1 + sum(writes_cache(node) for node in module.graph.nodes)
        self._run = Interpreter(module)
        self._run.args_iter = iter(inputs)
        self._left: Iterator[Node] = iter(module.graph.nodes)

    @property
    def held(self) -> list[Any]:
        """The values that later parts will read."""
        return list(self._run.env.values())

    def advance(self) -> Tensor | None:
        """Run one part; returns the graph's output with the last, None with all others."""
        run = self._run
        with torch.no_grad():
            for node in self._left:
                value: Any = run.run_node(node)
                if node.op == "output":
                    run.env.clear()
                    output: Tensor = value
                    return output
                run.env[node] = value
                for dead in run.user_to_last_uses.get(node, ()):
                    del run.env[dead]
                if writes_cache(node):
                    return None
        raise RuntimeError("the graph has run to its end")
