"""A transformed model's graphs and what they were lowered to; built once, shared by all sessions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.budgets import Plan
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.capture.facts import UNSHARDED, Shard
from xkv_fx.errors import BackendError, BudgetError, ModelMismatchError, UnsupportedModelError
from xkv_fx.lowering.backends.eager import run_eager
from xkv_fx.lowering.backends.table import backend_of
from xkv_fx.lowering.describe import describe_layers, describe_passes, describe_plan, describe_shard
from xkv_fx.lowering.in_parts import RunInParts
from xkv_fx.lowering.limit import check_limit
from xkv_fx.passes.analyses.known_tokens import known_tokens
from xkv_fx.passes.base import GraphPass
from xkv_fx.passes.pipeline import (
    PassStep,
    TransformedGraph,
    decode_pipeline,
    extend_pipeline,
    prefill_pipeline,
    run_pipeline,
    run_stepwise,
)
from xkv_fx.runtime.autocast import refuse_autocast
from xkv_fx.runtime.scorers import Scorer, scorer_of
from xkv_fx.runtime.slots import SlotPlan
from xkv_fx.runtime.state import CachePlan, GraphKind

Compiled = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Graphs:
    """The readable graphs of one captured model under one cache plan; rare ones are built on demand."""

    captured: CapturedModel
    plan: CachePlan
    scorer: Scorer
    _lock: threading.RLock = dataclasses.field(default_factory=threading.RLock, repr=False)
    _built: dict[tuple[GraphKind, bool], TransformedGraph] = dataclasses.field(default_factory=dict, repr=False)

    def get(self, kind: GraphKind, all_logits: bool = False) -> TransformedGraph:
        """The graph of that kind, and the records of the passes that made it."""
        with self._lock:
            key = (kind, all_logits)
            if key not in self._built:
                self._built[key] = self._build(kind, all_logits)
            return self._built[key]

    def _build(self, kind: GraphKind, all_logits: bool) -> TransformedGraph:
        return run_pipeline(*self._start(kind, all_logits))

    def steps(self, kind: GraphKind, all_logits: bool = False) -> tuple[PassStep, ...]:
        """The passes that make the graph of that kind, run again one by one, each with the graph that it leaves."""
        return run_stepwise(*self._start(kind, all_logits))

    def _start(self, kind: GraphKind, all_logits: bool) -> tuple[GraphModule, tuple[GraphPass, ...]]:
        if kind == "decode":
            return self.captured.graph("token"), decode_pipeline(self.plan)
        pipeline = prefill_pipeline if kind == "prefill" else extend_pipeline
        return self.captured.graph("prompt"), pipeline(self.plan, self.scorer, all_logits)

    @property
    def prefill(self) -> GraphModule:
        return self.get("prefill").module

    @property
    def extend(self) -> GraphModule:
        return self.get("extend").module

    @property
    def decode(self) -> GraphModule:
        return self.get("decode").module


def check_request(budgets: Plan, backend: str) -> Scorer:
    """The checks that need no model; returns the scorer that the plan names.

    Raises:
        BudgetError: not a plan, or its scorer cannot be made or does not go with its eviction.
        BackendError: an unknown backend.
    """
    if not isinstance(budgets, Plan):
        raise BudgetError(f"budgets must be an xkv_fx.Budgets; got {type(budgets).__name__}")
    backend_of(backend)
    return scorer_of(budgets.policy)


def compile_program(
    captured: CapturedModel, budgets: Plan, backend: str, max_new_tokens: int = 0, over_limit: bool = False
) -> CompiledProgram:
    """Give a captured model its caches and lower it.

    Args:
        over_limit: allow more bytes than the plan was solved for.

    Raises:
        BudgetError, ModelMismatchError: the plan does not fit the model, or more than its bytes would be allocated.
        UnsupportedModelError: the plan is for more tokens than the model is captured for.
        BackendError: an unknown backend, or one that lacks its compiler.
    """
    check_request(budgets, backend)
    budgets.check_layers(captured.layers, captured.fingerprint)
    scorer = captured.scorer_of(budgets.policy)
    recurrent = tuple(recurrence.parts for recurrence in captured.recurrences)
    plan = CachePlan.of(
        budgets,
        captured.layers,
        captured.rows,
        captured.dtype,
        captured.device,
        max_new_tokens,
        recurrent,
        captured.shard.rank,
        captured.shard.size,
    )
    _check_reach(captured, budgets, plan.slots)
    if not over_limit:
        check_limit(budgets, plan, max_new_tokens)
    return CompiledProgram(Graphs(captured, plan, scorer), backend)


def one_row_prompts(program: CompiledProgram, captured: CapturedModel) -> PromptProgram:
    """A program that feeds prompts to one row under the plan of another program; it has nothing to compile.

    Args:
        captured: the same model, for one row.

    Raises:
        ModelMismatchError: another model.
    """
    own = program.graphs.captured
    if (captured.fingerprint, captured.layers) != (own.fingerprint, own.layers):
        raise ModelMismatchError(
            f"the model that was transformed has been changed since: it was {own.fingerprint}, and is "
            f"{captured.fingerprint}; transform it again"
        )
    plan = dataclasses.replace(program.plan, rows=1)
    return PromptProgram(Graphs(captured, plan, program.graphs.scorer))


def _check_reach(captured: CapturedModel, budgets: Plan, slots: Sequence[SlotPlan]) -> None:
    """Refuse a plan for more tokens than the model is accepted for, though the model has positions for them."""
    full = (plan.slots for plan in slots if plan.eviction == "none")
    tokens, longest = max((budgets.provenance.context or 0, *full)), captured.max_positions
    if captured.ends_early and longest is not None and tokens > longest:
        raise UnsupportedModelError(
            f"{captured.fingerprint.partition(':')[0]} can be captured for {longest} positions, behind which "
            f"{captured.ends_early}; this plan is for {tokens} tokens"
        )


class PromptProgram:
    """The graphs that feed prompts and turns, as graphs of torch's own kernels."""

    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs
        self.plan = graphs.plan
        self.max_positions = graphs.captured.max_positions
        self.known_tokens = known_tokens(graphs.captured.prompt, graphs.captured.vocabulary)
        self.key = program_key(graphs.captured.fingerprint, self.plan, graphs.scorer, graphs.captured.shard)
        self._prompt = functools.cache(self._lower_prompt)

    def prefill(self, all_logits: bool) -> Compiled:
        self._check_prompt()
        return self._prompt("prefill", all_logits)

    def extend(self, all_logits: bool) -> Compiled:
        self._check_prompt()
        return self._prompt("extend", all_logits)

    def decode(self) -> Compiled:
        raise BackendError("this program feeds prompts only; it has no decode graph")

    def prompt_in_parts(self, kind: GraphKind, *inputs: Tensor) -> RunInParts:
        """The graph `kind` about to run on these inputs, state included, a layer at a time."""
        self._check_prompt()
        return RunInParts(self.graphs.get(kind).module, inputs)

    def _check_prompt(self) -> None:
        refuse_autocast(self.plan.device)
        self.graphs.captured.check_weights()

    def _lower_prompt(self, kind: GraphKind, all_logits: bool) -> Compiled:
        return run_eager(self.graphs.get(kind, all_logits).module)


class CompiledProgram(PromptProgram):
    """Lowered graphs; satisfies `runtime.session.Program`.

    Prefill and extend run as graphs of torch's own kernels; decode is what the backend makes of it.

    Attributes:
        backend: its name.
        lowered: the decode graph.
    """

    def __init__(self, graphs: Graphs, backend: str) -> None:
        super().__init__(graphs)
        self.backend = backend
        self.lowered = backend_of(backend).lower(graphs.decode)
        self._prompt("prefill", False)

    def decode(self) -> Compiled:  # whose weights were checked when the prompt came
        refuse_autocast(self.plan.device)
        return self.lowered.run

    def _ends(self) -> str:
        why = self.graphs.captured.ends_early
        return f", behind which {why}" if why else ""

    def describe(self, budgets: Plan) -> str:
        """What was planned and what was done about it, as text."""
        lines = [
            *describe_plan(self.graphs.captured.fingerprint, self.plan, self.graphs.scorer, budgets),
            *describe_shard(self.graphs.captured.shard),
            f"prefill       graph of torch kernels, length dynamic, up to {self.max_positions} positions{self._ends()}",
            f"decode        {backend_of(self.backend).describe(self.lowered)}",
            "",
            *describe_layers(self.plan),
        ]
        kinds: tuple[GraphKind, ...] = ("prefill", "decode")
        for kind in kinds:
            lines += ["", *describe_passes(kind, self.graphs.get(kind))]
        return "\n".join(lines)


def program_key(fingerprint: str, plan: CachePlan, scorer: Scorer, shard: Shard = UNSHARDED) -> str:
    """Identifies model, plan and batch size; a saved session fits programs of the same key."""
    part = () if shard.size == 1 else (shard.rank, shard.size)
    stored = tuple(part for part in (plan.formats, plan.mean_keys) if part is not None)
    split = () if plan.groups is None else (plan.groups,)
    carried = (plan.recurrent,) if plan.recurrent else ()
    indexed = tuple(spec.index_dim for spec in plan.layers)
    others = (*part, *stored, *split, *carried, *((indexed,) if any(indexed) else ()))
    made_for = (fingerprint, plan.layers, plan.slots, plan.rows, plan.dtype, scorer, *others)
    return hashlib.sha256(repr(made_for).encode()).hexdigest()
