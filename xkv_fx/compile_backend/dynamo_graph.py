"""What Dynamo hands to the backend: a model's graph with everything as an input, and marks that the model left in it.

It becomes a graph of `(input_ids, position_ids)` with weights as attributes, which `torch.export` can capture.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from xkv_fx.errors import BackendError, SessionError, UnsupportedModelError
from xkv_fx.hf.attention_entry import refusal
from xkv_fx.hf.recompile_limit import RAISE_LIMIT
from xkv_fx.passes.tools.graph import output_node, placeholders
from xkv_fx.runtime import tracing_marks  # noqa: F401  (registers the ops)

xkv_ops = torch.ops.xkv
Numbers = tuple[int | float | bool, ...]
_FOR_TRAINING = (torch._C._set_grad_enabled, torch._C._log_api_usage_once)


@dataclasses.dataclass(frozen=True)
class DynamoGraph:
    """A graph of `(input_ids, position_ids, *numbers)` with its weights as attributes, and which of Dynamo's inputs is
    which.

    Attributes:
        entry: what Dynamo traced, cleared of marks.
        ids, positions: indices of these inputs.
        mask: index of the attention mask `[rows, >= S]`; None if there is none.
        handle: index of the handle of the cache; None without a cache.
        weights: index of each weight by its name in `entry`.
        numbers: indices of the Python numbers that Dynamo takes as inputs once it has seen them change, between two
            models or two calls.
        many: whether it is a graph of several tokens a row, their number open; otherwise of one.
    """

    entry: GraphModule
    ids: int
    positions: int
    mask: int | None
    handle: int | None
    weights: Mapping[str, int]
    numbers: tuple[int, ...]
    many: bool

    def values(self, inputs: Sequence[Any]) -> Numbers:
        """The numbers of a call."""
        given = (inputs[index] for index in self.numbers)
        return tuple(value.item() if isinstance(value, Tensor) else value for value in given)

    def with_numbers(self, values: Numbers) -> GraphModule:
        """The graph of `(input_ids, position_ids)` for these numbers, which are constants to all passes."""
        if not values:
            return self.entry
        module = copy.copy(self.entry)
        module.graph = graph = copy.deepcopy(self.entry.graph)
        inputs = list(placeholders(graph).values())[2:]
        for node, value in zip(inputs, values, strict=True):
            for read in [user for user in node.users if _reads_number(user)]:
                read.replace_all_uses_with(cast(Any, value))
                graph.erase_node(read)
            node.replace_all_uses_with(cast(Any, value))
            graph.erase_node(node)
        module.recompile()
        return module

    @classmethod
    def of(cls, module: GraphModule, example_inputs: Sequence[Any]) -> DynamoGraph:
        graph = Graph()
        copies: dict[Node, Node] = {}
        graph.output(graph.graph_copy(module.graph, copies))
        inputs = [copies[node] for node in placeholders(module.graph).values()]
        _check_captured(graph)
        handle = _remove_marks(graph, xkv_ops.keys_of_session)
        valid = _remove_marks(graph, xkv_ops.keys_with_padding)
        mask = None if valid is None else _mask_behind(valid)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _FOR_TRAINING:
                graph.erase_node(node)
        output_node(graph).args = (_only_output(graph),)
        graph.eliminate_dead_code(_has_effects)
        return cls._with_roles(module, graph, inputs, example_inputs, mask, handle)

    @classmethod
    def _with_roles(
        cls,
        module: GraphModule,
        graph: Graph,
        inputs: list[Node],
        example_inputs: Sequence[Any],
        mask: Node | None,
        handle: Node | None,
    ) -> DynamoGraph:
        root = nn.Module()
        for node in graph.nodes:
            if node.op == "get_attr":
                setattr(root, str(node.target), getattr(module, str(node.target)))
        ids, positions = _token_inputs(inputs)
        length = _shape(ids)[1]
        if isinstance(length, int) and length > 1:
            raise BackendError(
                f"the graph is for {length} tokens alone; the backend 'xkv' compiles one for every number of them. "
                "Compile without dynamic=False, or with dynamic=True"
            )
        sizes = _sizes(ids)
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            entries = [graph.placeholder(name) for name in ("input_ids", "position_ids")]
        ids.replace_all_uses_with(entries[0])
        positions.replace_all_uses_with(entries[1])
        weights: dict[str, int] = {}
        numbers: list[int] = []
        for index, (node, value) in enumerate(zip(inputs, example_inputs, strict=True)):
            if not node.users:
                continue
            with graph.inserting_before(first):
                if _is_number(node, value) and node.name not in sizes:
                    numbers.append(index)
                    substitute = graph.placeholder(node.name)
                elif isinstance(value, Tensor) and _is_weight(node, value):
                    name = f"w{index}"
                    weights[name] = index
                    _set_weight(root, name, value)
                    substitute = graph.get_attr(name)
                elif node.name in sizes:
                    substitute = graph.call_method("size", (entries[0], sizes[node.name]))
                else:
                    raise BackendError(
                        f"the model takes {node.name} besides tokens and their positions; a model compiled for a "
                        "budgeted cache is called with input_ids, position_ids and attention_mask"
                    )
            node.replace_all_uses_with(substitute)
        for node in inputs:
            graph.erase_node(node)
        if not numbers:  # with some, the shape follows from them
            check_logits(_shape(cast(Node, output_node(graph).args[0])), length)
        where = {node: index for index, node in enumerate(inputs)}
        return cls(
            entry=GraphModule(root, graph),
            ids=where[ids],
            positions=where[positions],
            mask=None if mask is None else where[mask],
            handle=None if handle is None else where[handle],
            weights=weights,
            numbers=tuple(numbers),
            many=not isinstance(length, int),
        )


def _has_effects(node: Node) -> bool:
    """Whether a node is needed though nothing reads it; methods such as `copy_` change what others read."""
    return node.is_impure() or (
        node.op == "call_method" and re.fullmatch(r"\w*[a-z0-9]_", str(node.target)) is not None
    )


def leave_lengths_open(module: GraphModule, example_inputs: Sequence[Any]) -> None:
    """Have Dynamo retrace a graph in which it took lengths for constants, with these lengths left open.

    It leaves a size open only once it has seen it change, at the price of one more compilation of everything.
    """
    restart = getattr(torch._dynamo.exc, "TensorifyScalarRestartAnalysis", None)
    if restart is None:  # another torch: then Dynamo finds out by itself
        return
    marked = False
    for node, value in zip(placeholders(module.graph).values(), example_inputs, strict=True):
        if not isinstance(value, Tensor) or value.dim() != 2 or _is_weight(node, value):
            continue
        static = isinstance(node.meta["example_value"].shape[1], int)
        if static and value.shape[1] > 1 and not hasattr(value, "_dynamo_weak_dynamic_indices"):
            torch._dynamo.maybe_mark_dynamic(value, 1)
            marked = True
    if marked:
        raise restart(restart_reason="the number of tokens is left open")


def model_of_call() -> nn.Module | None:
    """The model whose frame Dynamo is compiling; None if it is some other frame.

    It may be the frame of a decorator that transformers put around `forward`, whose first argument is the model.
    """
    given = _locals_of_call()
    found = given.get("self", next(iter(_positional(given)), None))
    return found if isinstance(found, nn.Module) and hasattr(found, "config") else None


def arguments_of_call() -> Mapping[str, Any]:
    """What the frame that Dynamo is compiling was called with, by name."""
    given = _locals_of_call()
    model, named = model_of_call(), given.get("kwargs")
    arguments = {**given, **named} if isinstance(named, dict) else dict(given)
    if model is not None:
        values = [value for value in _positional(given) if value is not model]
        arguments.update(zip(inspect.signature(model.forward).parameters, values, strict=False))
    return arguments


def _positional(given: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a frame holds in `*args`."""
    found = given.get("args")
    return found if isinstance(found, tuple) else ()


def _locals_of_call() -> Mapping[str, Any]:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator: Any = InstructionTranslator.current_tx()
    found: Mapping[str, Any] = translator.f_locals
    return found


def attends_without_cache(module: GraphModule) -> bool:
    """Whether a graph of Dynamo's has attention, but none that reads a cache of ours."""
    attends = _calls(module.graph, xkv_ops.attention) or _calls(module.graph, xkv_ops.refused)
    return bool(attends) and not _calls(module.graph, xkv_ops.keys_of_session)


def _check_captured(graph: Graph) -> None:
    for node in _calls(graph, xkv_ops.refused):
        raise refusal(cast(int, node.args[1]), "the model")
    if not _calls(graph, xkv_ops.attention):
        raise BackendError(
            "there is no attention in the graph that Dynamo gives: call model.set_attn_implementation('xkv') before "
            "model.compile. If that was done, Dynamo broke the graph into pieces (TORCH_LOGS=graph_breaks says where), "
            f"or has given up on the model. {RAISE_LIMIT}"
        )


def _remove_marks(graph: Graph, mark: Any) -> Node | None:
    """Take all marks of a kind out of the graph; returns what they are marked with, the same in every layer."""
    marks = _calls(graph, mark)
    if not marks:
        return None
    with_what = {node.args[1] for node in marks}
    if len(with_what) != 1:
        raise UnsupportedModelError("the layers of the model use several caches or paddings in one call")
    for node in marks:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
    found: Any = with_what.pop()
    return found  # type: ignore[no-any-return]


def _mask_behind(valid: Node) -> Node:
    """The attention mask that a padding was sliced from."""
    found: set[Node] = set()
    pending = [valid]
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            found.add(node)
        pending.extend(node.all_input_nodes)
    tensors = [node for node in found if isinstance(node.meta["example_value"], Tensor)]
    if len(tensors) != 1:
        raise UnsupportedModelError("the model computes its padding from more than the attention mask")
    return tensors[0]


def _only_output(graph: Graph) -> Node:
    outputs: Any = output_node(graph).args[0]
    outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    if len(outputs) == 1 and isinstance(outputs[0], Node):
        return outputs[0]
    shapes = [tuple(_shape(node)) for node in outputs if isinstance(node, Node)]
    if any(len(shape) == 4 for shape in shapes):
        raise SessionError(
            "the model would keep all keys and values in a cache of its own: pass "
            "past_key_values=xkv_fx.Cache(model, budgets), or use_cache=False to run on the backend's own session"
        )
    raise BackendError(
        f"the model returns {len(outputs)} tensors instead of its logits alone; leave out labels, output_attentions, "
        "output_hidden_states and the like"
    )


def check_logits(shape: Any, length: Any) -> None:
    """Check that an output is logits `[rows, S, vocabulary]`, or of the last column alone.

    Args:
        length: S.

    Raises:
        BackendError: it is not.
    """
    if len(shape) != 3:
        raise BackendError(f"the model returns a tensor of shape {tuple(shape)} instead of logits of tokens")
    if str(shape[1]) not in ("1", str(length)):
        some = f"{shape[1]} tokens" if isinstance(shape[1], int) else "some of the tokens"
        raise BackendError(
            f"the model returns the logits of {some}; logits_to_keep must be 0 (all) or 1 (the last) in a "
            "model compiled for a budgeted cache"
        )


def _token_inputs(inputs: list[Node]) -> tuple[Node, Node]:
    """The inputs that are token ids and their positions, both int64 `[rows, S]`."""
    found = [
        node
        for node in inputs
        if node.users
        and isinstance(node.meta["example_value"], Tensor)
        and len(_shape(node)) == 2
        and node.meta["example_value"].dtype == torch.int64
        and not _is_weight(node, node.meta["example_value"])
    ]
    positions = [node for node in found if "position_ids" in node.name]
    ids = [node for node in found if node not in positions]
    if len(ids) != 1 or len(positions) != 1:
        names = ", ".join(node.name for node in found) or "none"
        raise BackendError(
            f"a model compiled for a budgeted cache is called with input_ids and, by its name, position_ids, int64 of "
            f"shape [rows, S]; found {names}. generate() gives both"
        )
    return ids[0], positions[0]


def _sizes(ids: Node) -> dict[str, int]:
    """Which dimension of the ids each symbolic size is, by the symbol's name."""
    return {str(size): dim for dim, size in enumerate(_shape(ids)) if not isinstance(size, int)}


def _is_weight(node: Node, value: Tensor) -> bool:
    return isinstance(value, nn.Parameter) or re.search(r"_(modules|parameters|buffers)_", str(node.target)) is not None


def _is_number(node: Node, value: Any) -> bool:
    """Whether an input is a Python number: a whole one as such, a float as a tensor that is read at once."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and all(map(_reads_number, node.users))
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat)


def _reads_number(node: Node) -> bool:
    return node.op == "call_method" and node.target == "item"


def _set_weight(root: nn.Module, name: str, value: Tensor) -> None:
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value, persistent=False)


def _calls(graph: Graph, packet: Any) -> list[Node]:
    targets = (packet, packet.default)
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def _shape(node: Node) -> Any:
    return node.meta["example_value"].shape
