"""Small helpers for editing a captured graph while keeping every node's fake value (`meta["val"]`) true."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher  # without it, older torch settles on open sizes in products
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.node import map_arg

from xkv_fx.errors import PassError


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of a call to an operator by name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    named = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    named.update(node.kwargs)
    for argument in schema.arguments:
        if argument.name not in named and argument.has_default_value():
            named[argument.name] = argument.default_value
    return named


def call_instead(node: Node, target: torch._ops.OpOverload, given: Mapping[str, Any]) -> None:
    """Make a node call another operator, with arguments by name; those that it does not take are left out."""
    node.target = target
    node.args, node.kwargs = tuple(given[argument.name] for argument in target._schema.arguments), {}


def calls(module: GraphModule, target: Any) -> list[Node]:
    """Every call of `target`, in execution order."""
    return [node for node in module.graph.nodes if node.op == "call_function" and node.target is target]


def changed_by(node: Node) -> list[Node]:
    """What a node changes in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    given = arguments(node)
    written = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return [given[name] for name in written if isinstance(given[name], Node)]


def output_node(graph: Graph) -> Node:
    """The graph's output."""
    output: Node = next(iter(reversed(graph.nodes)))
    return output


def attribute(module: GraphModule, target: str) -> torch.Tensor:
    """The tensor that `get_attr` nodes of that target read."""
    found: torch.Tensor = reduce(getattr, target.split("."), module)  # type: ignore[assignment]
    return found


def at_length(formula: Any, length: int) -> Any:
    """A size's formula (`SymInt.node.expr`, of the number of tokens alone) for so many tokens."""
    return formula.subs(dict.fromkeys(formula.free_symbols, length))


def placeholders(graph: Graph) -> dict[str, Node]:
    """The graph's inputs by name, in order."""
    return {node.name: node for node in graph.nodes if node.op == "placeholder"}


def open_sizes(graph: Graph) -> set[tuple[str, int]]:
    """Input and dimension of each size that is not a number yet."""
    return {
        (name, dim)
        for name, node in placeholders(graph).items()
        for dim, size in enumerate(getattr(node.meta.get("val"), "shape", ()))
        if not is_concrete_int(size)
    }


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The mode under which the graph was captured."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise PassError("the graph carries no fake values; capture it with torch.export")


def add_input(
    graph: Graph, name: str, shape: Sequence[int | torch.SymInt], dtype: torch.dtype, device: torch.device
) -> Node:
    """Add an input after the present ones."""
    last = list(placeholders(graph).values())[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    with fake_mode(graph):
        node.meta["val"] = torch.empty(tuple(shape), dtype=dtype, device=device)
    return node


def emit(graph: Graph, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Node:
    """Add a call at the graph's insertion point, and compute its fake value.

    A target that has an attribute `fake` is not run for that: `fake`, called alike, says what it returns.
    """
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    node.meta["val"] = run_fake(graph, target, args, kwargs)
    return node


def splice(module: GraphModule, part: GraphModule, inputs: Sequence[Any], name: str) -> tuple[Any, ...]:
    """Add the calls of another graph at the insertion point, on `inputs` in the place of its own; returns what stands
    for the outputs that it returns as a tuple. Its weights become attributes of `module`, called after `name`."""
    copies: dict[Node, Any] = dict(zip(placeholders(part.graph).values(), inputs, strict=True))
    for node in part.graph.nodes:
        if node.op == "get_attr":
            copies[node] = share_weight(module, f"{name}_{node.target}", attribute(part, str(node.target)))
        elif node.op == "call_function":
            args, kwargs = (map_arg(given, copies.__getitem__) for given in (node.args, node.kwargs))
            copies[node] = emit(module.graph, node.target, *args, **kwargs)
        elif node.op not in ("placeholder", "output"):
            raise PassError(f"{node.name} of {name} is no call of an operator")
    outputs: Any = output_node(part.graph).args[0]
    return tuple(copies[node] for node in outputs)


def share_weight(module: GraphModule, name: str, weight: torch.Tensor) -> Node:
    """A node that reads a weight of another module, which becomes an attribute of `module`, at the insertion point."""
    name = name.replace(".", "_")
    if isinstance(weight, torch.nn.Parameter):
        module.register_parameter(name, weight)
    else:
        module.register_buffer(name, weight, persistent=False)
    node = module.graph.get_attr(name)
    node.meta["val"] = fake_mode(module.graph).from_tensor(weight.detach(), static_shapes=True)
    return node


def propagate(graph: Graph, changed: Node) -> None:
    """Recompute the fake values of everything that depends on `changed`."""
    stale = {changed}
    for node in graph.nodes:
        if node.op == "call_function" and stale.intersection(node.all_input_nodes):
            node.meta["val"] = run_fake(graph, node.target, node.args, node.kwargs)
            stale.add(node)


@contextmanager
def at_start(graph: Graph) -> Iterator[None]:
    """Insert after the graph's inputs."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        yield


@contextmanager
def at_end(graph: Graph) -> Iterator[None]:
    """Insert before the graph's output."""
    with graph.inserting_before(output_node(graph)):
        yield


def constant(module: GraphModule, name: str, value: torch.Tensor) -> Node:
    """Add a tensor to a graph's module and a node that reads it, at the insertion point."""
    module.register_buffer(name, value, persistent=False)
    node = module.graph.get_attr(name)
    mode = fake_mode(module.graph)
    node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    return node


def run_fake(graph: Graph, target: Any, args: Any, kwargs: Any) -> Any:
    """What a call returns on the fake values of its arguments."""
    values = map_arg(args, fake_value), map_arg(kwargs, fake_value)
    mode = fake_mode(graph)
    # Numbers read off tensors become new symbols; a later trace would take these symbols for its own and miss them.
    fresh = nullcontext() if mode.shape_env is None else mode.shape_env.ignore_fresh_unbacked_symbols()
    with mode, torch.no_grad(), enable_python_dispatcher(), fresh:
        return getattr(target, "fake", target)(*values[0], **values[1])


def fake_value(value: Any) -> Any:
    """What a node computes, on fake values; anything else is its own value.

    Raises:
        PassError: nobody has computed the node's.
    """
    if not isinstance(value, Node):
        return value
    if "val" not in value.meta:
        raise PassError(f"the node {value.name!r} carries no fake value")
    return value.meta["val"]
