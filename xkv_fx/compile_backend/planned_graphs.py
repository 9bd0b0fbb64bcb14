"""What the backend makes of a graph of Dynamo's for one cache plan: the graphs of `transform`, and what runs them."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.capture.captured import CapturedModel
from xkv_fx.capture.check import LENGTH, check_continues
from xkv_fx.capture.export import export_graph
from xkv_fx.capture.facts import ModelFacts
from xkv_fx.capture.plain_module import PROBE_LENGTH
from xkv_fx.compile_backend.dynamo_graph import DynamoGraph, Numbers, check_logits
from xkv_fx.errors import BackendError, SessionError
from xkv_fx.lowering.backends.backend import Lowered
from xkv_fx.lowering.backends.table import backend_of
from xkv_fx.lowering.describe import describe_passes
from xkv_fx.lowering.lift_weights import lift_weights
from xkv_fx.lowering.program import Graphs, check_request
from xkv_fx.passes.analyses.find_attention import any_latent, attention_sites, cached_layers
from xkv_fx.passes.prepare.absorb_latents import AbsorbLatents
from xkv_fx.passes.prepare.open_last_logits import OpenLastLogits
from xkv_fx.passes.tools.graph import output_node, placeholders
from xkv_fx.public_budgets import Budgets
from xkv_fx.runtime.state import CachePlan, GraphKind


class PlannedGraphs:
    """The graphs of one compiled call under one cache plan, its numbers being constants: prefill and extend for several
    tokens, decode for one (and prefill, for a prompt of one token).

    Attributes:
        many: whether they are for several tokens a row.
        all_logits: whether the call returns the logits of every token.
    """

    def __init__(
        self, source: DynamoGraph, numbers: Numbers, plan: CachePlan, budgets: Budgets, lower: str, facts: ModelFacts
    ) -> None:
        self.source = source
        self.backend = backend_of(lower)
        self.many = source.many
        captured, self.all_logits = _capture(source, numbers, plan, facts)
        self.graphs = Graphs(captured, plan, check_request(budgets, lower))
        self._decode: Lowered | None = None
        self._lowered: dict[tuple[GraphKind, bool], Callable[..., Tensor]] = {}
        self._lock = threading.RLock()
        self.lowered("prefill" if self.many else "decode")

    def bound_to(self, inputs: Sequence[Any]) -> BoundGraphs:
        """These graphs with the weights of a call."""
        return BoundGraphs(self, {name: inputs[index] for name, index in self.source.weights.items()})

    def lowered(self, kind: GraphKind) -> Callable[..., Tensor]:
        """The graph of that kind, as a function of weights by name and the graph's own inputs."""
        key = (kind, kind != "decode" and self.all_logits)
        with self._lock:
            if key not in self._lowered:
                self._lowered[key] = self._lower(*key)
            return self._lowered[key]

    def _lower(self, kind: GraphKind, all_logits: bool) -> Callable[..., Tensor]:
        lifted, constants = lift_weights(self.graphs.get(kind, all_logits).module)
        code: Callable[..., Tensor] = lifted
        if kind == "decode":
            self._decode = self.backend.lower(lifted)
            code = self._decode.run

        def run(weights: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
            with torch.no_grad():
                return code(*(weights.get(name, constant) for name, constant in constants.items()), *inputs)

        return run

    def module(self, kind: GraphKind) -> GraphModule:
        """The readable graph of that kind."""
        return self.graphs.get(kind, kind != "decode" and self.all_logits).module

    def describe(self) -> list[str]:
        """What was made, as lines of text."""
        lines = [""]
        if self.many:
            lines.append("several tokens    graph of torch kernels, length dynamic")
        if self._decode is not None:
            lines.append(f"one token         {self.backend.describe(self._decode)}")
        for kind, all_logits in self._lowered:
            lines += describe_passes(kind, self.graphs.get(kind, all_logits))
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


def _capture(source: DynamoGraph, numbers: Numbers, plan: CachePlan, facts: ModelFacts) -> tuple[CapturedModel, bool]:
    """What `transform` would start from, and whether the call wants the logits of every token."""
    length = min(PROBE_LENGTH, facts.max_positions or PROBE_LENGTH) if source.many else 1
    ids = torch.zeros(plan.rows, length, dtype=torch.int64, device=plan.device)
    positions = torch.arange(length, device=plan.device).expand(plan.rows, -1).contiguous()
    graph, _ = export_graph(source.with_numbers(numbers), (ids, positions), facts.max_positions)
    if any_latent(plan.layers):
        AbsorbLatents()(graph)
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
    tokens = next(iter(placeholders(graph.graph).values()))
    check_logits(logits.meta["val"].shape, tokens.meta["val"].shape[1])
    all_logits = logits.meta["val"].shape[1] != 1
    if source.many and not all_logits:
        OpenLastLogits()(graph)
    vocabulary = int(logits.meta["val"].shape[2])
    if source.many:
        _check_continues(graph, plan, vocabulary)
    token = None if source.many else graph
    return CapturedModel(graph, token, layers, plan.rows, vocabulary, facts), all_logits


def _check_continues(graph: GraphModule, plan: CachePlan, vocabulary: int) -> None:
    """Tokens meet in attention alone, so that the graph may go on from a cache."""
    ids = torch.arange(plan.rows * LENGTH, device=plan.device).view(plan.rows, LENGTH) % vocabulary
    positions = torch.arange(LENGTH, device=plan.device).expand(plan.rows, -1).contiguous()
    with torch.no_grad():
        check_continues(graph, None, ids, graph(ids, positions), plan.dtype)
