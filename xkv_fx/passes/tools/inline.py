"""Functions of tensors as a part of a graph: `inline` adds the aten ops that one calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from xkv_fx.errors import PassError
from xkv_fx.passes.tools.graph import fake_mode, fake_value


def inline(graph: Graph, function: Callable[..., Any], *args: Node, name: str | None = None) -> Any:
    """Run a function of tensors on fake values, and add the aten ops that it calls at the insertion point.

    Args:
        name: what the resulting node is called, where it is a single one.

    Returns:
        the nodes that stand for what `function` returns, in the same structure.

    Raises:
        PassError: it needs a tensor that is not among its arguments, or a size that is neither one of their sizes nor a
            sum or product of these.
    """
    adding = _Adding(graph, args, function)
    with fake_mode(graph), torch.no_grad(), enable_python_dispatcher(), adding:
        values = function(*map(fake_value, args))
    result = tree_map(adding.node, values)
    if name is not None:
        result._rename(name)
    return result


class _Adding(TorchDispatchMode):
    """Adds a node for each op that runs under it."""

    def __init__(self, graph: Graph, inputs: Sequence[Node], function: Callable[..., Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self.inputs, self.function = graph, inputs, function
        self.nodes: dict[int, tuple[Node, Any]] = {}  # an id is a value's own for as long as the value is kept
        self.sizes: dict[Any, Node] = {}
        for node in inputs:
            self._know(fake_value(node), node)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_map(self.node, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.detach.default:  # torch calls it on what it has just made; without gradients, nothing
            self._know(out, given[0][0])
            return out
        node = self._add(func, given[0], given[1], out)
        if isinstance(out, tuple | list):
            for index, value in enumerate(out):
                self._know(value, self._add(operator.getitem, (node, index), {}, value))
        self._know(out, node)
        return out

    def node(self, value: Any) -> Any:
        """What stands in the graph for a value that an op is given or the function returns."""
        if isinstance(value, torch.SymInt):
            return self._size(value.node.expr)
        if not isinstance(value, torch.Tensor | torch.SymFloat | torch.SymBool):
            return value
        if id(value) not in self.nodes:
            what = f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else value
            raise PassError(f"cannot inline {self.function}: it needs the constant {what}; build it from its inputs")
        return self.nodes[id(value)][0]

    def _size(self, formula: Any) -> Node | int:
        if formula.is_Integer:
            return int(formula)
        if formula not in self.sizes:
            self.sizes[formula] = self._input_size(formula) or self._computed_size(formula)
        return self.sizes[formula]

    def _input_size(self, formula: Any) -> Node | None:
        for node in self.inputs:
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr == formula:
                    return self._add(torch.ops.aten.sym_size.int, (node, dim), {}, size)
        return None

    def _computed_size(self, formula: Any) -> Node:
        operation = operator.add if formula.is_Add else operator.mul if formula.is_Mul else None
        if operation is None:
            raise PassError(f"cannot inline {self.function}: it needs the size {formula}, which no input of it has")
        first, *others = (self._size(term) for term in formula.args)
        for other in others:
            first = self._add(operation, (first, other), {}, operation(fake_value(first), fake_value(other)))
        return cast(Node, first)

    def _add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Node:
        node = self.graph.create_node("call_function", target, args, kwargs)
        node.meta["val"] = value
        return node

    def _know(self, value: Any, node: Node) -> None:
        self.nodes[id(value)] = node, value
