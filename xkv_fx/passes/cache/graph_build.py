"""The tool with which states add their parts to a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from xkv_fx.errors import PassError
from xkv_fx.passes.analyses.find_attention import AttentionSite, attention_sites, cached_layers, check_borrowed
from xkv_fx.passes.analyses.find_recurrence import RecurrenceSite, recurrence_sites
from xkv_fx.passes.analyses.find_rotation import unrotated_inputs
from xkv_fx.passes.tools.graph import add_input, at_start, constant, emit, splice
from xkv_fx.passes.tools.inline import inline
from xkv_fx.passes.tools.roles import FED, LENGTH, find_role, give_role, with_role
from xkv_fx.runtime.scorers import Scorer, check_scores_parts
from xkv_fx.runtime.state import Attention, BorrowedState, CachePlan, GraphKind, LayerState


class GraphBuild:
    """A graph whose inputs are the buffers of a plan's states; see `runtime.state.Build`.

    Making one adds the inputs, and the states' constants. Each input has its buffer's name as its role.

    Attributes:
        sites: the graph's attentions, in execution order.
        states: of the plan.

    Raises:
        PassError: the graph's attentions, or the layers that mix tokens by a state, are not the planned ones.
        BudgetError: an attention that borrows a cache which evicts by score; or heads that are planned differently,
            and a scorer that must see all heads of a layer.
    """

    def __init__(self, module: GraphModule, plan: CachePlan, scorer: Scorer | None = None) -> None:
        if scorer is not None and plan.groups is not None:
            check_scores_parts(scorer)
        self.graph = module.graph
        self.states = plan.states
        self.sites = _planned_sites(module, plan)
        self._recurrences = _planned_recurrences(module, plan)
        self._module = module
        self._plan = plan
        self._scorer = scorer
        self._held: dict[LayerState, dict[str, Node]] = {}
        for state in plan.states:
            self._held[state] = {}
            for buffer in state.buffers:
                node = add_input(self.graph, buffer.name, buffer.shape, buffer.dtype, plan.device)
                give_role(node, buffer.name)
                self._held[state][buffer.field] = node
        with at_start(self.graph):
            self._constants = {
                state: {each.field: constant(module, each.name, each.value) for each in of_state}
                for state, of_state in plan.constants.items()
            }
        self._length = find_role(self.graph, LENGTH)
        self._scorer_inputs = {} if scorer is None else unrotated_inputs(module, self.sites, scorer)
        self._first = next(node for node in self.graph.nodes if node.op != "placeholder")
        self._made: dict[object, Any] = {}

    @property
    def scorer(self) -> Scorer:
        if self._scorer is None:
            raise PassError("the graph of one token ranks no tokens")
        return self._scorer

    @property
    def length(self) -> Node:
        return with_role(self.graph, LENGTH) if self._length is None else self._length

    @property
    def fed(self) -> Node:
        found = find_role(self.graph, FED)
        return self.length if found is None else found

    def state_of(self, site: AttentionSite) -> LayerState:
        """What an attention reads: its own cache, or an earlier one's."""
        cache = self._plan.caches[site.index]
        return BorrowedState(cache) if site.borrows else cache

    @property
    def borrowed(self) -> str:
        """A note for records of how many attentions read another one's cache; empty if none does."""
        count = sum(site.borrows for site in self.sites)
        return f"; {count} attentions read an earlier one's cache" if count else ""

    @property
    def carried(self) -> str:
        """A note for records of how many layers mix tokens by a state; empty if none does."""
        return f"; {len(self._recurrences)} layers carry a state" if self._recurrences else ""

    def held(self, state: LayerState) -> Mapping[str, Node]:
        return self._held[state]

    def constants(self, state: LayerState) -> Mapping[str, Node]:
        return self._constants[state]

    def scorer_inputs(self, attention: Attention) -> Mapping[str, Any]:
        return self._scorer_inputs[attention.node]

    def emit(self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Node:
        return emit(self.graph, target, *args, name=name, **kwargs)

    def inline(self, function: Callable[..., Any], *args: Any, name: str | None = None) -> Any:
        return inline(self.graph, function, *args, name=name)

    def splice(self, part: GraphModule | None, inputs: Sequence[Any], name: str) -> tuple[Any, ...]:
        if part is None:
            raise PassError(f"{name} was captured without its graph of one token; capture the model again with it")
        return splice(self._module, part, inputs, name)

    def carry_states(self, kind: GraphKind) -> None:
        """Let each layer that mixes tokens by a state go on from it, and leave it as it is behind the tokens."""
        for site, state in zip(self._recurrences, self._plan.recurrences, strict=True):
            with self.graph.inserting_before(site.node):
                out = state.carried(self, site, kind)
            site.node.replace_all_uses_with(out)
            self.graph.erase_node(site.node)

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            with self.graph.inserting_before(self._first):
                self._made[key] = make()
        return self._made[key]


def _planned_recurrences(module: GraphModule, plan: CachePlan) -> Sequence[RecurrenceSite]:
    sites = recurrence_sites(module)
    if tuple(site.recurrence.parts for site in sites) != plan.recurrent:
        names = ", ".join(site.node.name for site in sites) or "none"
        raise PassError(
            f"the graph's {len(sites)} layers that mix tokens by a state ({names}) are not the {len(plan.recurrent)} "
            "planned ones"
        )
    return sites


def _planned_sites(module: GraphModule, plan: CachePlan) -> Sequence[AttentionSite]:
    sites = attention_sites(module)
    if cached_layers(sites) != plan.specs:
        names = ", ".join(site.node.name for site in sites)
        raise PassError(
            f"the graph's {len(sites)} attention nodes ({names}) are not the {len(plan.specs)} planned caches"
        )
    for site in sites:
        check_borrowed(site, plan.slots[site.index].eviction)
    return sites
