"""Giving every attention its cache: three passes, for a fresh prefill, for extending what is kept, and for decode.

Each adds the state of the cache plan as graph inputs, which the graph mutates in place; a session owns the tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from xkv_fx.errors import PassError
from xkv_fx.passes.analyses.find_attention import AttentionSite, attention_sites, cached_layers, check_borrowed
from xkv_fx.passes.analyses.find_rotation import unrotated_inputs
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.graph import add_input, at_end, at_start, emit, named
from xkv_fx.passes.tools.inline import inline
from xkv_fx.policy import EVICTIONS
from xkv_fx.runtime.attention import distance_bias
from xkv_fx.runtime.scorers import Scorer, rescore_tokens, score_tokens
from xkv_fx.runtime.slots import SlotPlan
from xkv_fx.runtime.state import CachePlan

xkv = torch.ops.xkv
aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class InsertPrefillCache(GraphPass):
    """Before: `CompactPadding` has run. After: behind each attention, its tokens are scored and the survivors written
    to that layer's buffers before the next layer runs; what the buffers held is forgotten."""

    plan: CachePlan
    scorer: Scorer
    name: ClassVar[str] = "insert_prefill_cache"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        sites = _sites(module, self.plan)
        state = _add_state(graph, self.plan)
        length = named(graph, "length")
        owners = [site for site in sites if not site.borrows]
        before_rotation = unrotated_inputs(module, sites, self.scorer)
        for site, plan in zip(owners, self.plan.slots, strict=True):
            with graph.inserting_after(site.node):
                score = scoring(score_tokens, self.scorer, sliding_window=site.sliding_window, softcap=site.softcap)
                scores = emit(
                    graph, score, site.q, site.k, site.v if self.scorer.reads_values else None, length, None,
                    site.scale, sinks=site.sinks, slopes=site.slopes, **before_rotation[site.node],
                    name=f"scores_{site.index}",
                )  # fmt: skip
            with graph.inserting_after(scores):
                kept = _keep(graph, site, plan, scores, length, state, fresh=True)
            with graph.inserting_after(kept):
                _remember_scores(graph, site, kept, state)
        with at_end(graph):
            emit(graph, aten.copy_.default, state["seen"], length)
            emit(graph, aten.copy_.default, state["base"], length)
        return PassRecord(self.name, len(sites), 2 * len(owners), f"scorer {self.scorer}{_borrowed(sites)}")


@dataclasses.dataclass(frozen=True)
class InsertExtendCache(GraphPass):
    """Before: `CompactPadding` has run. After: each attention also reaches the slots that its layer kept, and survivors
    are chosen again among these slots and the new tokens. A row without new tokens keeps its state."""

    plan: CachePlan
    scorer: Scorer
    name: ClassVar[str] = "insert_extend_cache"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        sites = _sites(module, self.plan)
        state = _add_state(graph, self.plan)
        length, seen, base = named(graph, "length"), state["seen"], state["base"]
        before_rotation = unrotated_inputs(module, sites, self.scorer)
        shared: dict[SlotPlan, Node] = {}
        last = {site.index: site for site in sites}
        owner = {site.index: site for site in sites if not site.borrows}
        for site in sites:
            plan = self.plan.slots[site.index]
            with graph.inserting_before(site.node):
                attended = self._extend(graph, site, plan, state, shared)
                if site is last[site.index]:  # all that reach the slots have done so
                    scored = owner[site.index]
                    self._rescore_and_keep(graph, scored, plan, state, length, before_rotation[scored.node])
            site.node.replace_all_uses_with(attended)
            graph.erase_node(site.node)
        with at_end(graph):
            new_seen, new_base = inline(graph, _extended_counters, seen, base, length)
            emit(graph, aten.copy_.default, seen, new_seen)
            emit(graph, aten.copy_.default, base, new_base)
        changed = len(sites) + 2 * len(owner)
        return PassRecord(self.name, len(sites), changed, f"scorer {self.scorer}{_borrowed(sites)}")

    def _extend(
        self, graph: Graph, site: AttentionSite, plan: SlotPlan, state: dict[str, Node], shared: dict[SlotPlan, Node]
    ) -> Node:
        k_cache, v_cache, positions = _buffers(state, site.index)
        seen, base = state["seen"], state["base"]
        mask = shared.get(plan)
        if mask is None:
            mask = inline(graph, _extend_mask(plan), positions, seen, base, site.q)
            if plan.sliding_window is None:
                shared[plan] = mask
        ages = None if site.slopes is None else inline(graph, plan.extend_ages, positions, seen, base)
        return emit(
            graph, xkv.extend_attention.default, site.q, site.k, site.v, k_cache, v_cache, mask, site.scale,
            sliding_window=site.sliding_window, softcap=site.softcap, sinks=site.sinks, slopes=site.slopes,
            ages=ages, name=f"attention_{site.index}",
        )  # fmt: skip

    def _rescore_and_keep(
        self,
        graph: Graph,
        site: AttentionSite,
        plan: SlotPlan,
        state: dict[str, Node],
        length: Node,
        before_rotation: dict[str, Node | None],
    ) -> None:
        k_cache, v_cache, positions = _buffers(state, site.index)
        score = scoring(
            rescore_tokens, self.scorer, plan.slots, plan=plan, sliding_window=site.sliding_window,
            softcap=site.softcap,
        )  # fmt: skip
        scores = emit(
            graph, score, site.q, site.k, site.v, length, state["seen"], state["base"], k_cache, v_cache, positions,
            site.scale, sinks=site.sinks, slopes=site.slopes, **before_rotation, name=f"scores_{site.index}",
        )  # fmt: skip
        kept = _keep(graph, site, plan, scores, length, state, fresh=False)
        if plan.eviction == "scored":
            kept = inline(graph, _scores_of_rows_with_tokens, kept, state[f"scores_{site.index}"], length)
        _remember_scores(graph, site, kept, state)


@dataclasses.dataclass(frozen=True)
class InsertDecodeCache(GraphPass):
    """Before: a graph of one token, all shapes static. After: each attention writes its token into one slot of its
    layer's buffers and attends to the valid ones; one that borrows its K/V writes what is there already. Slot and mask
    are computed once for all layers of equal plans."""

    plan: CachePlan
    name: ClassVar[str] = "insert_decode_cache"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        sites = _sites(module, self.plan)
        state = _add_state(graph, self.plan)
        seen, base = state["seen"], state["base"]
        with at_start(graph):
            slots = self._shared_slots(graph, seen, base)
            masks = self._shared_masks(graph, state)
        for site in sites:
            plan = self.plan.slots[site.index]
            with graph.inserting_before(site.node):
                if plan.eviction == "scored":
                    attended = self._decode_scored(graph, site, plan, state)
                else:
                    attended = self._decode(graph, site, slots[plan], masks.get(plan), plan, state)
            site.node.replace_all_uses_with(attended)
            graph.erase_node(site.node)
        with at_end(graph):
            emit(graph, aten.add_.Tensor, seen, 1)
        note = f"{len(slots)} groups of layers share a slot{_borrowed(sites)}"
        return PassRecord(self.name, len(sites), len(sites), note)

    def _decode(
        self, graph: Graph, site: AttentionSite, slot: Node, mask: Node | None, plan: SlotPlan, state: dict[str, Node]
    ) -> Node:
        k_cache, v_cache, positions = _buffers(state, site.index)
        if site.slopes is not None:
            mask = inline(graph, _biased_mask(plan), positions, state["seen"], state["base"], site.slopes)
        elif mask is None:
            mask = inline(graph, _decode_mask(plan, self.plan.dtype), positions, state["seen"], state["base"])
        return emit(
            graph, xkv.decode_attention.default, site.q, site.k, site.v, k_cache, v_cache, slot, mask, site.scale,
            softcap=site.softcap, sinks=site.sinks, name=f"attention_{site.index}",
        )  # fmt: skip

    def _decode_scored(self, graph: Graph, site: AttentionSite, plan: SlotPlan, state: dict[str, Node]) -> Node:
        return emit(
            graph, xkv.decode_scored.default, site.q, site.k, site.v, *_buffers(state, site.index),
            state[f"scores_{site.index}"], state["seen"], site.scale, recent=plan.recent, sink_tokens=plan.sinks,
            sliding_window=plan.sliding_window, softcap=site.softcap, sinks=site.sinks, slopes=site.slopes,
            name=f"attention_{site.index}",
        )  # fmt: skip

    def _shared_slots(self, graph: Graph, seen: Node, base: Node) -> dict[SlotPlan, Node]:
        return {
            plan: inline(graph, plan.next_slot, seen, base, name=f"slot_of_{plan.slots}")
            for plan in dict.fromkeys(self.plan.slots)
            if plan.eviction != "scored"
        }

    def _shared_masks(self, graph: Graph, state: dict[str, Node]) -> dict[SlotPlan, Node]:
        """Masks that depend on counters alone. A slot's validity does not depend on how many slots follow it, so that
        one mask as long as the largest layer serves every layer that starts to use its slots in order."""
        shared = (plan for plan in dict.fromkeys(self.plan.slots) if plan.eviction != "scored")
        plain = [plan for plan in shared if not plan.masks_by_position]
        inputs = (state["positions_0"], state["seen"], state["base"])
        longest = max((plan for plan in plain if plan.eviction != "append"), key=lambda plan: plan.slots, default=None)
        masks: dict[SlotPlan, Node] = {}
        for plan in sorted(plain, key=lambda plan: -plan.slots):
            name = f"mask_of_{plan.slots}"
            if plan.eviction == "append" or plan == longest:
                masks[plan] = inline(graph, _decode_mask(plan, self.plan.dtype), *inputs, name=name)
            else:
                masks[plan] = emit(graph, aten.slice.Tensor, masks[longest], 3, 0, plan.slots, name=name)  # type: ignore[index]
        return masks


def _sites(module: GraphModule, plan: CachePlan) -> tuple[AttentionSite, ...]:
    sites = attention_sites(module)
    if cached_layers(sites) != plan.layers:
        names = ", ".join(site.node.name for site in sites)
        raise PassError(
            f"the graph's {len(sites)} attention nodes ({names}) are not the {len(plan.layers)} planned layers"
        )
    for site in sites:
        check_borrowed(site, plan.slots[site.index].eviction)
    return sites


def _borrowed(sites: Sequence[AttentionSite]) -> str:
    count = sum(site.borrows for site in sites)
    return f"; {count} attentions read an earlier one's cache" if count else ""


def _add_state(graph: Graph, plan: CachePlan) -> dict[str, Node]:
    return {name: add_input(graph, name, *plan.shape_and_dtype(name), plan.device) for name in plan.names()}


def _buffers(state: dict[str, Node], index: int) -> tuple[Node, Node, Node]:
    return state[f"k_{index}"], state[f"v_{index}"], state[f"positions_{index}"]


def _keep(
    graph: Graph, site: AttentionSite, plan: SlotPlan, scores: Node, length: Node, state: dict[str, Node], fresh: bool
) -> Node:
    k_cache, v_cache, positions = _buffers(state, site.index)
    return emit(
        graph, xkv.keep.default, site.k, site.v, scores, length, state["seen"], state["base"], k_cache, v_cache,
        positions, capacity=plan.capacity, recent=plan.recent, sinks=plan.sinks,
        eviction=EVICTIONS.index(plan.eviction), sliding_window=plan.sliding_window, fresh=fresh,
    )  # fmt: skip


def _remember_scores(graph: Graph, site: AttentionSite, kept: Node, state: dict[str, Node]) -> None:
    """Under `"scored"`, decode goes on from the scores with which the survivors were chosen."""
    scores = state.get(f"scores_{site.index}")
    if scores is not None:
        emit(graph, aten.copy_.default, scores, kept)


def scoring(function: Callable[..., Tensor], scorer: Scorer, slots: int = 0, **fixed: object) -> Callable[..., Tensor]:
    """`function` with the scorer and what else the graph cannot hold fixed, under a name that the graph can print.

    Passes take the shape of the scores from what every scorer promises. They never run one: a branch or a loop of its
    own over the number of tokens would fix that number in the graph.

    Args:
        slots: candidates besides the new tokens.
    """

    def score(*args: object, **kwargs: object) -> Tensor:
        return function(*args, scorer=scorer, **kwargs, **fixed)

    def fake(q: Tensor, k: Tensor, *args: object, **kwargs: object) -> Tensor:
        return k.new_empty((*k.shape[:2], slots + k.shape[2]), dtype=torch.float32)

    score.fake = fake  # type: ignore[attr-defined]
    score.__name__ = score.__qualname__ = f"{function.__name__}_by_{type(scorer).__name__}"
    score.__module__ = function.__module__
    score.reads_cache = True  # type: ignore[attr-defined]  # for the check that nothing else does
    return score


def _extend_mask(plan: SlotPlan) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return lambda positions, seen, base, q: plan.extend_mask(positions, seen, base, q.shape[2])


def _decode_mask(plan: SlotPlan, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def mask(positions: Tensor, seen: Tensor, base: Tensor) -> Tensor:
        valid = plan.decode_mask(positions, seen, base)
        return torch.zeros(valid.shape, dtype=dtype, device=seen.device).masked_fill(~valid, float("-inf"))

    return mask


def _biased_mask(plan: SlotPlan) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def mask(positions: Tensor, seen: Tensor, base: Tensor, slopes: Tensor) -> Tensor:
        valid = plan.decode_mask(positions, seen, base)
        bias = distance_bias(slopes, plan.decode_ages(positions, seen, base)[:, :, None])
        return bias.masked_fill(~valid[:, :, None], float("-inf")).flatten(1, 2)

    return mask


def _scores_of_rows_with_tokens(kept: Tensor, held: Tensor, length: Tensor) -> Tensor:
    return torch.where((length > 0)[:, None, None], kept, held)


def _extended_counters(seen: Tensor, base: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    return seen + length, torch.where(length > 0, seen + length, base)
