"""The backend `"xkv"` of `torch.compile`: from Dynamo, a graph goes through the passes of `transform`, then Inductor.

Dynamo traces the model twice, once for several tokens, their number left open, and once for one. Each graph is cleared
of what the model left in it for us (see `runtime.compile_ops`), and is then what `torch.export` captures for
`transform`; the same pipelines make prefill, extend and decode of it, for each cache plan that it meets. Weights stay
inputs of the graph, as Dynamo has them. A call runs on the session that its `xkv_fx.Cache` owns, or without one
(`use_cache=False`) on a session of the backend's own, one for each model, plan and number of rows.

An error of ours is raised when the graph runs: Dynamo would wrap one that is raised while it compiles.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from xkv_fx.budgets import Budgets
from xkv_fx.errors import BackendError, PromptError, SessionError, UnsupportedModelError, XkvError
from xkv_fx.lowering.inductor import compile_lifted
from xkv_fx.lowering.lift_weights import lift_weights
from xkv_fx.lowering.program import LOWERED, Graphs, check_request, describe_passes
from xkv_fx.passes.capture_module import PROBE_LENGTH
from xkv_fx.passes.captured import CapturedModel
from xkv_fx.passes.check_capture import LENGTH, check_capture
from xkv_fx.passes.clean_graph import CleanGraph
from xkv_fx.passes.export_graph import export_graph
from xkv_fx.passes.find_attention import attention_sites, cached_layers
from xkv_fx.passes.graph import output_node
from xkv_fx.passes.open_last_logits import OpenLastLogits
from xkv_fx.runtime import compile_ops  # noqa: F401  (registers the ops)
from xkv_fx.runtime.state import CachePlan

if TYPE_CHECKING:
    from xkv_fx.hf.compile_cache import Cache

xkv_ops = torch.ops.xkv
_FOR_TRAINING = (torch._C._set_grad_enabled, torch._C._log_api_usage_once)


def xkv(
    module: GraphModule,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """What `torch.compile(model, backend="xkv", options={"budgets": budgets})` calls with each graph of Dynamo's.

    Args:
        module: Dynamo's graph.
        example_inputs: its inputs in this call.
        options: `"budgets"`, the plan or the path of its file; `"lower"`, `"inductor"` (the default) or `"eager"`, for
            decode; `"max_new_tokens"`, room under `eviction="append"` in the backend's own session.

    Returns:
        what runs in the graph's place. It raises, when it is called:
        BackendError: missing or unknown options, a mode, or a graph that is not a whole model.
        SessionError: a cache that is not ours, or of another model or plan.
        PromptError, CapacityError: as `Session.feed`, and for positions that are not those of the tokens.
        BudgetError, ModelMismatchError, UnsupportedModelError: as `xkv_fx.transform`.
    """
    try:
        given = _Options.of(options, mode)
        _leave_lengths_open(module, example_inputs)
        return _CompiledCall(_DynamoGraph.of(module, example_inputs), given, _model_of_call()).run
    except XkvError as error:
        return functools.partial(_raise_again, error)


@dataclasses.dataclass(frozen=True)
class _Options:
    budgets: Budgets
    lower: str
    max_new_tokens: int

    @classmethod
    def of(cls, options: Any, mode: str | None) -> _Options:
        from xkv_fx.hf.compile_cache import plan_of

        if mode is not None:
            raise BackendError(f"the backend 'xkv' has no modes; leave mode={mode!r} out and pass options")
        known = ("budgets", "lower", "max_new_tokens")
        if not isinstance(options, Mapping) or "budgets" not in options:
            raise BackendError("the backend 'xkv' needs a plan: pass options={'budgets': budgets}, or a plan's path")
        unknown = sorted(str(name) for name in options if name not in known)
        if unknown:
            raise BackendError(f"unknown options {', '.join(unknown)}; the backend 'xkv' knows {', '.join(known)}")
        try:
            budgets = plan_of(options["budgets"])
        except OSError as error:
            raise BackendError(f"options['budgets']: no plan can be read there ({error})") from error
        lower = options.get("lower", "inductor")
        check_request(budgets, lower)
        return cls(budgets, lower, options.get("max_new_tokens", 0))


@dataclasses.dataclass(frozen=True)
class _DynamoGraph:
    """A graph of `(input_ids, position_ids)` with its weights as attributes, and which of Dynamo's inputs is which.

    Attributes:
        entry: what Dynamo traced, cleared of marks.
        ids, positions: indices of these inputs.
        mask: index of the attention mask `[rows, >= S]`; None if there is none.
        handle: index of the handle of the cache; None without a cache.
        weights: index of each weight by its name in `entry`.
        many: whether it is a graph of several tokens a row, their number open; otherwise of one.
    """

    entry: GraphModule
    ids: int
    positions: int
    mask: int | None
    handle: int | None
    weights: Mapping[str, int]
    many: bool

    @classmethod
    def of(cls, module: GraphModule, example_inputs: Sequence[Any]) -> _DynamoGraph:
        _refuse_foreign_cache()
        graph = Graph()
        copies: dict[Node, Node] = {}
        graph.output(graph.graph_copy(module.graph, copies))
        inputs = [copies[node] for node in module.graph.nodes if node.op == "placeholder"]
        _check_captured(graph)
        handle = _remove_marks(graph, xkv_ops.keys_of_session)
        valid = _remove_marks(graph, xkv_ops.keys_with_padding)
        mask = None if valid is None else _mask_behind(valid)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _FOR_TRAINING:
                graph.erase_node(node)
        output_node(graph).args = (_only_output(graph),)
        graph.eliminate_dead_code()
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
    ) -> _DynamoGraph:
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
        _check_logits(_shape(cast(Node, output_node(graph).args[0])), length)
        sizes = _sizes(ids)
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            entries = [graph.placeholder(name) for name in ("input_ids", "position_ids")]
        ids.replace_all_uses_with(entries[0])
        positions.replace_all_uses_with(entries[1])
        weights: dict[str, int] = {}
        for index, (node, value) in enumerate(zip(inputs, example_inputs, strict=True)):
            if not node.users:
                continue
            with graph.inserting_before(first):
                if isinstance(value, Tensor) and _is_weight(node, value):
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
        where = {node: index for index, node in enumerate(inputs)}
        return cls(
            entry=GraphModule(root, graph),
            ids=where[ids],
            positions=where[positions],
            mask=None if mask is None else where[mask],
            handle=None if handle is None else where[handle],
            weights=weights,
            many=not isinstance(length, int),
        )


class _CompiledCall:
    """One graph of Dynamo's, and what was made of it for each cache plan."""

    def __init__(self, graph: _DynamoGraph, options: _Options, model: nn.Module | None) -> None:
        self.graph = graph
        self.options = options
        self.model = None if model is None else weakref.ref(model)
        self.planned: dict[CachePlan, PlannedGraphs] = {}
        self.lock = threading.Lock()

    def run(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Feed the tokens of a call to its session."""
        ids, positions = inputs[self.graph.ids], inputs[self.graph.positions].expand_as(inputs[self.graph.ids])
        valid = None if self.graph.mask is None else inputs[self.graph.mask][:, -ids.shape[1] :] != 0
        cache = self._cache(inputs, ids)
        plan = cache.session.program.plan
        if ids.shape[0] != plan.rows:
            raise PromptError(
                f"got {ids.shape[0]} rows, but this xkv_fx.Cache was made for batch_size={plan.rows}; make one with "
                f"batch_size={ids.shape[0]} (rows count beams and return sequences)"
            )
        _check_positions(cache, ids, positions, valid, own=self.graph.handle is None)
        planned = self._planned(plan, cache)
        with cache.running(planned.bound_to(inputs)):
            if self.graph.many or not any(cache.session.seen):
                return (cache.feed(ids, positions, valid, planned.all_logits),)
            if valid is not None and not bool(valid.all()):
                raise PromptError("a row has padding for its next token; decode takes one token a row")
            return (cache.step(ids, positions),)

    def _cache(self, inputs: Sequence[Any], ids: Tensor) -> Cache:
        from xkv_fx.hf.compile_cache import cache_of

        model = None if self.model is None else self.model()
        if self.graph.handle is None:
            cache = _own_cache(model, self.options, ids.shape[0])
            if self.graph.many:
                cache.reset()
            return cache
        cache = cache_of(inputs[self.graph.handle])
        if cache.budgets != self.options.budgets:
            raise SessionError(
                "this xkv_fx.Cache was made for other budgets than those that the model is compiled with; use the same"
            )
        if model is not None and cache.model() is not model:
            raise SessionError("this xkv_fx.Cache was made for another model; make one for this model")
        return cache

    def _planned(self, plan: CachePlan, cache: Cache) -> PlannedGraphs:
        with self.lock:
            if plan not in self.planned:
                self.planned[plan] = PlannedGraphs(self.graph, plan, self.options, cache.session.program.max_positions)
            return self.planned[plan]


class PlannedGraphs:
    """The graphs of one compiled call under one cache plan: prefill and extend for several tokens, decode for one (and
    prefill, for a prompt of one token).

    Attributes:
        many: whether they are for several tokens a row.
        all_logits: whether the call returns the logits of every token.
    """

    def __init__(self, source: _DynamoGraph, plan: CachePlan, options: _Options, longest: int | None) -> None:
        self.source = source
        self.options = options
        self.many = source.many
        captured, self.all_logits = _capture(source, plan, longest)
        self.graphs = Graphs(captured, plan, check_request(options.budgets, options.lower))
        self.attention = "torch ops"
        self._lowered: dict[tuple[str, bool], Callable[..., Tensor]] = {}
        self._lock = threading.RLock()
        self.lowered("prefill" if self.many else "decode")

    def bound_to(self, inputs: Sequence[Any]) -> BoundGraphs:
        """These graphs with the weights of a call."""
        return BoundGraphs(self, {name: inputs[index] for name, index in self.source.weights.items()})

    def lowered(self, kind: Any) -> Callable[..., Tensor]:
        """The graph of that kind, as a function of weights by name and the graph's own inputs."""
        key = (kind, kind != "decode" and self.all_logits)
        with self._lock:
            if key not in self._lowered:
                self._lowered[key] = self._lower(*key)
            return self._lowered[key]

    def _lower(self, kind: Any, all_logits: bool) -> Callable[..., Tensor]:
        lifted, constants = lift_weights(self.graphs.get(kind, all_logits).module)
        code: Callable[..., Tensor] = lifted
        if kind == "decode" and self.options.lower == "inductor":
            code, self.attention = compile_lifted(lifted)

        def run(weights: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
            with torch.no_grad():
                return code(*(weights.get(name, constant) for name, constant in constants.items()), *inputs)

        return run

    def module(self, kind: Any) -> GraphModule:
        """The readable graph of that kind."""
        return self.graphs.get(kind, kind != "decode" and self.all_logits).module

    def describe(self) -> list[str]:
        """What was made, as lines of text."""
        lower = f"{LOWERED[self.options.lower]}; attention: {self.attention}"
        made = "several tokens    graph of torch kernels, length dynamic" if self.many else f"one token         {lower}"
        lines = ["", made]
        for kind, all_logits in self._lowered:
            lines += describe_passes(kind, self.graphs.get(kind, all_logits))  # type: ignore[arg-type]
        return lines


@dataclasses.dataclass(frozen=True)
class BoundGraphs:
    """What a session asks of its program, for one call."""

    planned: PlannedGraphs
    weights: Mapping[str, Tensor]

    def prefill(self, all_logits: bool) -> Callable[..., Tensor]:
        return functools.partial(self.planned.lowered("prefill"), self.weights)

    def extend(self, all_logits: bool) -> Callable[..., Tensor]:
        return functools.partial(self.planned.lowered("extend"), self.weights)

    def decode(self) -> Callable[..., Tensor]:
        return functools.partial(self.planned.lowered("decode"), self.weights)


def _capture(source: _DynamoGraph, plan: CachePlan, longest: int | None) -> tuple[CapturedModel, bool]:
    """What `transform` would start from, and whether the call wants the logits of every token."""
    length = min(PROBE_LENGTH, longest or PROBE_LENGTH) if source.many else 1
    ids = torch.zeros(plan.rows, length, dtype=torch.int64, device=plan.device)
    positions = torch.arange(length, device=plan.device).expand(plan.rows, -1).contiguous()
    graph, _ = export_graph(source.entry, (ids, positions), longest)
    CleanGraph()(graph)
    layers = cached_layers(attention_sites(graph))
    if len(layers) < len(plan.layers):
        raise BackendError(
            f"Dynamo broke the model's graph into pieces; this one has {len(layers)} of {len(plan.layers)} attentions. "
            "TORCH_LOGS=graph_breaks says where"
        )
    if layers != plan.layers:
        raise SessionError(
            f"the {len(layers)} layers of this model are not the {len(plan.layers)} that the xkv_fx.Cache was made "
            "for; make one for this model"
        )
    logits: Any = output_node(graph.graph).args[0]
    all_logits = logits.meta["val"].shape[1] != 1
    if source.many and not all_logits:
        OpenLastLogits()(graph)
    if source.many:
        _check_continues(graph, plan)
    captured = CapturedModel(
        prompt=graph,
        token=None if source.many else graph,
        layers=layers,
        fingerprint="",
        rows=plan.rows,
        dtype=plan.dtype,
        device=plan.device,
        max_positions=longest,
        vocabulary=int(logits.meta["val"].shape[2]),
    )
    return captured, all_logits


def _check_continues(graph: GraphModule, plan: CachePlan) -> None:
    """Tokens meet in attention alone, so that the graph may go on from a cache."""
    ids = torch.arange(plan.rows * LENGTH, device=plan.device).view(plan.rows, LENGTH)
    positions = torch.arange(LENGTH, device=plan.device).expand(plan.rows, -1).contiguous()
    with torch.no_grad():
        check_capture(graph, None, ids, graph(ids, positions), plan.dtype)


_own: weakref.WeakKeyDictionary[nn.Module, dict[Any, Cache]] = weakref.WeakKeyDictionary()


def compiled_session(model: nn.Module) -> Cache:
    """The session that calls of a compiled model without a cache run on; the latest one if there are several.

    Several tokens start it anew by themselves, as a prompt; `reset()` does so for a prompt of one token. `describe()`
    says what was compiled.

    Args:
        model: a model that `torch.compile(model, backend="xkv", options=...)` made or was given.

    Raises:
        SessionError: there was no such call.
    """
    source = getattr(model, "_orig_mod", model)
    caches = _own.get(source)
    if not caches:
        raise SessionError(
            f"no session: this {type(source).__name__} was not called yet as one that torch.compile made with "
            "backend='xkv', with use_cache=False"
        )
    return next(reversed(caches.values()))


def _own_cache(model: nn.Module | None, options: _Options, rows: int) -> Cache:
    from xkv_fx.hf.compile_cache import Cache

    if model is None:
        raise BackendError(
            "the model of this call is not known, since something around it was compiled; compile the model itself, or "
            "pass past_key_values=xkv_fx.Cache(model, budgets)"
        )
    caches = _own.setdefault(model, {})
    key = (options.budgets, rows, options.max_new_tokens)
    cache = caches.pop(key, None)
    caches[key] = Cache(model, options.budgets, rows, options.max_new_tokens) if cache is None else cache
    return caches[key]


def _check_positions(cache: Cache, ids: Tensor, positions: Tensor, valid: Tensor | None, own: bool) -> None:
    """Positions count the valid tokens of each row, from those that its session has seen."""
    seen = cache.session.state["seen"][:, None]
    counted = seen + (torch.ones_like(ids) if valid is None else valid.long()).cumsum(1) - 1
    wrong = positions != counted if valid is None else (positions != counted) & valid
    if bool(wrong.any()):
        seen_by_row = ", ".join(map(str, cache.session.seen))
        hint = (
            "several tokens start anew, and xkv_fx.compiled_session(model).reset() does so for one"
            if own
            else "pass an attention_mask that leaves out padding alone (without one, generate leaves out every padding "
            "id), and pad on the left"
        )
        raise PromptError(
            f"position_ids do not go on from the tokens that the rows of this session have seen ({seen_by_row}); {hint}"
        )


def _leave_lengths_open(module: GraphModule, example_inputs: Sequence[Any]) -> None:
    """Have Dynamo trace a graph again whose lengths it took for constants, with these lengths open.

    It leaves a size open only once it has seen it change, at the price of one more compilation of everything.
    """
    restart = getattr(torch._dynamo.exc, "TensorifyScalarRestartAnalysis", None)
    if restart is None:  # another torch: then Dynamo finds out by itself
        return
    marked = False
    for node, value in zip(_placeholders(module.graph), example_inputs, strict=True):
        if not isinstance(value, Tensor) or value.dim() != 2 or _is_weight(node, value):
            continue
        static = isinstance(node.meta["example_value"].shape[1], int)
        if static and value.shape[1] > 1 and not hasattr(value, "_dynamo_weak_dynamic_indices"):
            torch._dynamo.maybe_mark_dynamic(value, 1)
            marked = True
    if marked:
        raise restart(restart_reason="the number of tokens is left open")


def _model_of_call() -> nn.Module | None:
    """The model whose frame Dynamo is compiling; None if it is some other frame."""
    found = _locals_of_call().get("self")
    return found if isinstance(found, nn.Module) and hasattr(found, "config") else None


def _locals_of_call() -> Mapping[str, Any]:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator: Any = InstructionTranslator.current_tx()
    found: Mapping[str, Any] = translator.f_locals
    return found


def _refuse_foreign_cache() -> None:
    from xkv_fx.hf.compile_cache import Cache

    given = _locals_of_call()
    arguments = {**given, **given["kwargs"]} if isinstance(given.get("kwargs"), dict) else given
    for name in ("past_key_values", "cache"):
        cache = arguments.get(name)
        if cache is not None and not isinstance(cache, Cache):
            raise SessionError(
                f"a {type(cache).__name__} has no bounded memory that the plan knows of; pass "
                f"{name}=xkv_fx.Cache(model, budgets) to a model that is compiled with backend='xkv'"
            )


def _check_captured(graph: Graph) -> None:
    from xkv_fx.hf.attention_entry import refusal

    for node in _calls(graph, xkv_ops.refused):
        raise refusal(cast(int, node.args[1]), "the model")
    if not _calls(graph, xkv_ops.attention):
        raise BackendError(
            "there is no attention in the graph that Dynamo gives: call model.set_attn_implementation('xkv') before "
            "model.compile. If that was done, Dynamo broke the graph into pieces (TORCH_LOGS=graph_breaks says where), "
            "or has compiled as many kinds of calls as it may (torch._dynamo.config.recompile_limit; "
            "torch._dynamo.reset() starts anew)"
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


def _check_logits(shape: Any, length: Any) -> None:
    """The output is logits `[rows, S, vocabulary]`, or of the last column alone."""
    if len(shape) != 3:
        raise BackendError(f"the model returns a tensor of shape {tuple(shape)} instead of logits of tokens")
    if str(shape[1]) not in ("1", str(length)):
        raise BackendError(
            f"the model returns the logits of {shape[1]} tokens; logits_to_keep must be 0 (all) or 1 (the last) in a "
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


def _set_weight(root: nn.Module, name: str, value: Tensor) -> None:
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value, persistent=False)


def _calls(graph: Graph, packet: Any) -> list[Node]:
    targets = (packet, packet.default)
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def _placeholders(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _shape(node: Node) -> Any:
    return node.meta["example_value"].shape


def _raise_again(error: XkvError, *inputs: Any) -> tuple[Tensor, ...]:
    raise type(error)(*error.args) from error
