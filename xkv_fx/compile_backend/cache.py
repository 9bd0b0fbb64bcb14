"""The cache of a model that `torch.compile` compiles with the backend `"xkv"`: a transformers `Cache` of planned size.

While Dynamo traces the model, `update` hands new keys and values through and marks them with one small tensor of the
session, which thereby becomes an input of the graph. When the graph runs, the backend finds the cache by that tensor,
so that caches share compiled code. Nothing that forward reads of a cache changes from call to call, so that Dynamo has
no reason to compile again.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from xkv_fx.budgets import Plan
from xkv_fx.capture.facts import UNSHARDED, ModelFacts
from xkv_fx.compile_backend.planned_graphs import BoundGraphs, PlannedGraphs
from xkv_fx.errors import BudgetError, SessionError, UnsupportedModelError
from xkv_fx.files import is_int
from xkv_fx.hf.cache import SessionCache
from xkv_fx.hf.capture import layers_of_source
from xkv_fx.hf.inspect import read_model
from xkv_fx.hf.recompile_limit import RAISE_LIMIT
from xkv_fx.hf.recurrences import keeps_states
from xkv_fx.hf.rotary import refuse_changing_rotary
from xkv_fx.lowering.describe import describe_layers, describe_plan
from xkv_fx.lowering.limit import check_limit
from xkv_fx.lowering.program import program_key
from xkv_fx.public_budgets import Budgets, budgets_of
from xkv_fx.runtime import tracing_marks  # noqa: F401  (registers the ops)
from xkv_fx.runtime.scorers import scorer_of
from xkv_fx.runtime.session import Graph
from xkv_fx.runtime.state import CachePlan


class Cache(SessionCache):
    """K/V buffers of exactly the planned size, for `model.generate(..., past_key_values=xkv_fx.Cache(model, budgets))`
    of a model compiled with `model.compile(backend="xkv", options={"budgets": budgets})`.

    Like transformers' own caches, it gets the whole conversation each time: a prompt on an empty cache is prefilled,
    several new tokens on a filled one extend it, one new token is decoded.

    Args:
        model: the transformers causal language model that is compiled; it is not changed.
        budgets: the plan, or the path of a file that holds it; the one that the model is compiled with.
        batch_size: rows after expansion: batch x beams or return sequences.
        max_new_tokens: room for generated tokens under `eviction="append"`.
        over_limit: allow more bytes than the plan was solved for with `kv_bytes`, which is refused otherwise.

    Attributes:
        budgets: the plan.

    Raises:
        BudgetError: the plan does not fit the model's layers, a count is not a whole number of at least 1, or more
            would be allocated than the bytes that the plan was solved for.
        FileFormatError, MissingFileError: see `Budgets.load`.
        ModelMismatchError: the plan was made for another model.
        UnsupportedModelError: the model has no KV cache that can be planned.
    """

    def __init__(
        self,
        model: Any,
        budgets: Plan | str | os.PathLike[str],
        batch_size: int = 1,
        max_new_tokens: int = 0,
        over_limit: bool = False,
    ) -> None:
        budgets = plan_of(budgets)
        if not is_int(batch_size) or batch_size < 1:
            raise BudgetError(f"batch_size must be a whole number of at least 1; got {batch_size!r}")
        source, facts = read_model(model)
        refuse_changing_rotary(facts.name, facts.rotary)
        if keeps_states(source):
            raise UnsupportedModelError(
                f"{facts.name} has recurrent layers, whose states the backend 'xkv' does not carry along; use "
                "xkv_fx.transform"
            )
        if facts.picked is not None:
            raise UnsupportedModelError(
                f"{facts.name} has indexers, whose keys the backend 'xkv' does not keep; use xkv_fx.transform"
            )
        if facts.shard != UNSHARDED:
            raise UnsupportedModelError(
                f"{facts.name} is split among processes, which the backend 'xkv' does not take; use xkv_fx.transform"
            )
        layers = layers_of_source(source, facts)
        budgets.check_layers(layers, facts.fingerprint)
        plan = CachePlan.of(budgets, layers, batch_size, facts.dtype, facts.device, max_new_tokens)
        if not over_limit:
            check_limit(budgets, plan, max_new_tokens)
        known_tokens = cast(Tensor, source.get_input_embeddings().weight).shape[0]
        self._planned = _PlanOnly(plan, budgets, facts, known_tokens)
        super().__init__(self._planned)
        self.model: weakref.ref[nn.Module] = weakref.ref(source)
        self._register()

    def _register(self) -> None:
        self.handle = self.session.counts["seen"]
        _by_handle[self.handle.data_ptr()] = self

    @property
    def budgets(self) -> Budgets:
        return self._planned.budgets

    @property
    def facts(self) -> ModelFacts:
        """What is known about the model."""
        return self._planned.facts

    @contextmanager
    def running(self, graphs: BoundGraphs) -> Iterator[None]:
        """Feed and step through the graphs of whichever call of the model is running."""
        self._planned.used[graphs.planned] = None
        self._planned.current.graphs = graphs
        try:
            yield
        finally:
            self._planned.current.graphs = None

    def describe(self) -> str:
        """The plan, and what the backend compiled for it so far, as text."""
        planned = self._planned
        lines = describe_plan(planned.facts.fingerprint, planned.plan, planned.scorer, planned.budgets)
        lines += ["", *describe_layers(planned.plan)]
        made = [line for graphs in self.graphs for line in graphs.describe()]
        return "\n".join(lines + (made or ["", "nothing compiled yet"]))

    @property
    def graphs(self) -> tuple[PlannedGraphs, ...]:
        """What the backend made of each call that this cache took part in, in order of first use; see there for the
        graphs themselves."""
        return tuple(self._planned.used)

    def fork(self) -> Cache:
        """An independent cache with the same history. `copy.copy` and `copy.deepcopy` make one too."""
        twin = Cache.__new__(Cache)
        twin._hold(self.session.fork())
        twin._planned, twin.model = self._planned, self.model
        twin._register()
        return twin

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """transformers' hook, for Dynamo: K/V as they are, marked with this cache."""
        if not torch.compiler.is_dynamo_compiling():
            raise SessionError(
                "an xkv_fx.Cache works in a compiled model only: call model.set_attn_implementation('xkv') and "
                "model.compile(backend='xkv', options={'budgets': budgets}) before. If that was done, Dynamo has given "
                f"up on it. {RAISE_LIMIT}"
            )
        return torch.ops.xkv.keys_of_session(key_states, self.handle), value_states

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:  # type: ignore[override]
        """Tokens fed so far per row, including evicted ones and padding. Dynamo gets a tensor, since it would compile a
        number into the graph; the backend then asks for `position_ids`."""
        return self.handle[0] if torch.compiler.is_dynamo_compiling() else self.fed

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """For masks. Ours needs no offset, and a count of tokens would be compiled into the graph."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """For masks, which ours makes for the new tokens alone."""
        return query_length, 0


_by_handle: weakref.WeakValueDictionary[int, Cache] = weakref.WeakValueDictionary()


def cache_of(handle: Tensor) -> Cache:
    """The cache that a handle belongs to.

    Raises:
        SessionError: it is gone.
    """
    cache = _by_handle.get(handle.data_ptr())
    if cache is None or cache.handle.data_ptr() != handle.data_ptr():
        raise SessionError("the xkv_fx.Cache of this call is gone; keep a reference to it while the model runs")
    return cache


def plan_of(budgets: Any) -> Budgets:
    """A plan, given as such or by the path of its file.

    Raises:
        BudgetError: neither.
        FileFormatError, MissingFileError: see `Budgets.load`.
    """
    if isinstance(budgets, Plan):
        return budgets_of(budgets)
    if isinstance(budgets, str | os.PathLike):
        return Budgets.load(budgets)
    raise BudgetError(f"budgets must be an xkv_fx.Budgets or the path of one; got {type(budgets).__name__}")


class _PlanOnly:
    """A `runtime.session.Program` whose graphs come from whichever compiled call is running."""

    def __init__(self, plan: CachePlan, budgets: Budgets, facts: ModelFacts, known_tokens: int) -> None:
        self.plan = plan
        self.budgets = budgets
        self.facts = facts
        self.max_positions = facts.max_positions
        self.known_tokens = known_tokens
        self.scorer = scorer_of(budgets.policy)
        self.key = program_key(facts.fingerprint, plan, self.scorer)
        self.used: dict[PlannedGraphs, None] = {}
        self.current = threading.local()

    def prefill(self, all_logits: bool) -> Graph:
        return self._graphs().prefill(all_logits)

    def extend(self, all_logits: bool) -> Graph:
        return self._graphs().extend(all_logits)

    def decode(self) -> Graph:
        return self._graphs().decode()

    def _graphs(self) -> BoundGraphs:
        graphs: BoundGraphs | None = getattr(self.current, "graphs", None)
        if graphs is None:
            raise SessionError("feed an xkv_fx.Cache through its compiled model, not by itself")
        return graphs
