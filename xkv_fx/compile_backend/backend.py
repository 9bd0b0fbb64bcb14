"""The backend `"xkv"` of `torch.compile`: from Dynamo, a graph goes through the passes of `transform`, then Inductor.

Dynamo traces the model twice, once for several tokens, their number left open, and once for one. Each graph is cleared
of what the model left in it for us (see `runtime.tracing_marks`), and is then what `torch.export` captures for
`transform`; the same pipelines make prefill, extend and decode of it, for each cache plan that it meets. Weights stay
inputs of the graph, as Dynamo has them. A call runs on the session that its `xkv_fx.Cache` owns, or without one
(`use_cache=False`) on a session of the backend's own, one for each model, plan and number of rows.

An error of ours is raised when the graph runs: Dynamo would wrap one that is raised while it compiles.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from xkv_fx.compile_backend.cache import Cache, cache_of, plan_of
from xkv_fx.compile_backend.dynamo_graph import (
    DynamoGraph,
    Numbers,
    arguments_of_call,
    attends_without_cache,
    leave_lengths_open,
    model_of_call,
)
from xkv_fx.compile_backend.models_of_calls import ModelsOfCalls
from xkv_fx.compile_backend.planned_graphs import PlannedGraphs
from xkv_fx.errors import BackendError, PromptError, SessionError, XkvError
from xkv_fx.hf.cache_name import CACHE_NAME, CACHE_NAMES, TRANSFORMERS
from xkv_fx.hf.inspect import check_model
from xkv_fx.lowering.program import check_request
from xkv_fx.public_budgets import Budgets
from xkv_fx.runtime.autocast import refuse_autocast
from xkv_fx.runtime.state import CachePlan


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
        for device in {value.device for value in example_inputs if isinstance(value, Tensor)}:
            refuse_autocast(device)
        leave_lengths_open(module, example_inputs)
        _check_caches(module)
        return _CompiledCall(DynamoGraph.of(module, example_inputs), given, model_of_call(), example_inputs).run
    except XkvError as error:
        return functools.partial(_raise_again, error)


def _check_caches(module: GraphModule) -> None:
    """Check that a call has exactly one cache, that it is ours, and that the call uses it."""
    arguments = arguments_of_call()
    caches = {name: arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None}
    for name, cache in caches.items():
        if not isinstance(cache, Cache):
            raise SessionError(
                f"a {type(cache).__name__} has no bounded memory that the plan knows of; pass "
                f"{name}=xkv_fx.Cache(model, budgets) to a model that is compiled with backend='xkv'"
            )
    if len(caches) > 1:  # even the same one: Dynamo would run this call's graph for others, with another one
        raise SessionError(f"{' and '.join(caches)} are two names for one argument; pass one")
    if caches and attends_without_cache(module):
        raise SessionError(
            f"the model does not use the xkv_fx.Cache that it was given as {next(iter(caches))}; transformers "
            f"{TRANSFORMERS} calls this argument {CACHE_NAME}"
        )


@dataclasses.dataclass(frozen=True)
class _Options:
    budgets: Budgets
    lower: str
    max_new_tokens: int
    over_limit: bool

    @classmethod
    def of(cls, options: Any, mode: str | None) -> _Options:
        if mode is not None:
            raise BackendError(f"the backend 'xkv' has no modes; leave mode={mode!r} out and pass options")
        known = ("budgets", "lower", "max_new_tokens", "over_limit")
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
        return cls(budgets, lower, options.get("max_new_tokens", 0), bool(options.get("over_limit", False)))


class _CompiledCall:
    """One graph of Dynamo's, and what was made of it for each cache plan."""

    def __init__(
        self, graph: DynamoGraph, options: _Options, model: nn.Module | None, example_inputs: Sequence[Any]
    ) -> None:
        self.graph = graph
        self.options = options
        self.models = (
            None if model is None else ModelsOfCalls(_source_of(model), graph.weights.values(), example_inputs)
        )
        self.planned: dict[tuple[CachePlan, Numbers], PlannedGraphs] = {}
        self.lock = threading.Lock()

    def run(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Feed the tokens of a call to its session."""
        refuse_autocast(inputs[self.graph.ids].device)
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
        planned = self._planned(plan, cache, self.graph.values(inputs))
        with cache.running(planned.bound_to(inputs)):
            if self.graph.many or not any(cache.session.seen):
                return (cache.feed(ids, positions, valid, planned.all_logits),)
            if valid is not None and not bool(valid.all()):
                raise PromptError("a row has padding for its next token; decode takes one token a row")
            return (cache.step(ids, positions),)

    def _cache(self, inputs: Sequence[Any], ids: Tensor) -> Cache:
        if self.graph.handle is None:
            model = None if self.models is None else self.models.calling(inputs)
            cache = _own_cache(model, self.options, ids.shape[0])
            if self.graph.many:
                cache.reset()
            return cache
        cache = cache_of(inputs[self.graph.handle])
        if cache.budgets != self.options.budgets:
            raise SessionError(
                "this xkv_fx.Cache was made for other budgets than those that the model is compiled with; use the same"
            )
        if not self._is_for_this_model(cache, inputs):
            raise SessionError("this xkv_fx.Cache was made for another model; make one for this model")
        return cache

    def _is_for_this_model(self, cache: Cache, inputs: Sequence[Any]) -> bool:
        """Where something around the model was compiled, the first cache that was made for its weights tells it."""
        model = cache.model()
        if self.models is None and model is not None:
            models = ModelsOfCalls(model, self.graph.weights.values(), inputs)
            self.models = models if models.holds(model, inputs) else None
        return self.models is not None and self.models.holds(model, inputs)

    def _planned(self, plan: CachePlan, cache: Cache, numbers: Numbers) -> PlannedGraphs:
        key = (plan, numbers)
        with self.lock:
            if key not in self.planned:
                self.planned[key] = PlannedGraphs(
                    self.graph, numbers, plan, self.options.budgets, self.options.lower, cache.facts
                )
            return self.planned[key]


_own: weakref.WeakKeyDictionary[nn.Module, dict[Any, Cache]] = weakref.WeakKeyDictionary()


def compiled_session(model: nn.Module) -> Cache:
    """The session that calls of a compiled model without a cache run on; the latest one if there are several.

    Several tokens restart this session, as a prompt; for a prompt of one token call `reset()` first. `describe()`
    says what was compiled.

    Args:
        model: a model that `torch.compile(model, backend="xkv", options=...)` made or was given.

    Raises:
        SessionError: there was no such call.
    """
    source = _source_of(getattr(model, "_orig_mod", model))
    caches = _own.get(source)
    if not caches:
        raise SessionError(
            f"no session: this {type(source).__name__} was not called yet as one that torch.compile made with "
            "backend='xkv', with use_cache=False"
        )
    return next(reversed(caches.values()))


def _source_of(model: nn.Module) -> nn.Module:
    """The transformers model that is compiled; what holds peft adapters is compiled around it."""
    return check_model(model)


def _own_cache(model: nn.Module | None, options: _Options, rows: int) -> Cache:
    if model is None:
        raise BackendError(
            "the model of this call is not known, since something around it was compiled; compile the model itself, or "
            "pass past_key_values=xkv_fx.Cache(model, budgets)"
        )
    caches = _own.setdefault(model, {})
    key = (options.budgets, rows, options.max_new_tokens)
    cache = caches.pop(key, None)
    if cache is None:
        cache = Cache(model, options.budgets, rows, options.max_new_tokens, options.over_limit)
    caches[key] = cache
    return caches[key]


def _check_positions(cache: Cache, ids: Tensor, positions: Tensor, valid: Tensor | None, own: bool) -> None:
    """Positions count the valid tokens of each row, from those that its session has seen."""
    seen = cache.session.counts["seen"][:, None]
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


def _raise_again(error: XkvError, *inputs: Any) -> tuple[Tensor, ...]:
    raise type(error)(*error.args) from error
