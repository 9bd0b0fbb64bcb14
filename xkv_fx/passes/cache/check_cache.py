"""The last pass of every pipeline: it changes nothing and refuses a graph that is not what the plan says."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from xkv_fx.errors import PassError
from xkv_fx.passes.analyses.find_recurrence import recurrence_sites
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.graph import arguments, calls, changed_by
from xkv_fx.passes.tools.roles import nodes_by_role
from xkv_fx.runtime import coded_ops, indexed_ops, ops  # noqa: F401  (register the ops)
from xkv_fx.runtime.recurrence import PromptCall
from xkv_fx.runtime.state import CACHE_KINDS, CachePlan, GraphKind

xkv = torch.ops.xkv
DECODE_OPS = tuple(kind.ops[use] for kind in CACHE_KINDS for use in ("decode", "decode_scored"))
KEEP_OPS = tuple(kind.ops["keep"] for kind in CACHE_KINDS)
BESIDE_OPS = (xkv.pick_slots.default, xkv.keep_index.default)
READERS = (*DECODE_OPS, *KEEP_OPS, *BESIDE_OPS, *(kind.ops["extend"] for kind in CACHE_KINDS))


@dataclasses.dataclass(frozen=True)
class CheckCache(GraphPass):
    """After: every cache has exactly one op that fills its buffers, every capacity is the planned literal, no cache is
    copied, and no mask over all pairs of tokens is left.

    Raises:
        PassError: naming the nodes that are wrong.
    """

    plan: CachePlan
    kind: GraphKind
    name: ClassVar[str] = "check_cache"

    def run(self, module: GraphModule) -> PassRecord:
        writers = DECODE_OPS if self.kind == "decode" else KEEP_OPS
        writes = [node for node in module.graph.nodes if node.target in writers]
        if self.kind == "decode":
            writes = _owners(writes, ("k", "v", "k_cache", "v_cache", "slot"))
        self._expect(len(writes) == len(self.plan.specs), f"{len(self.plan.specs)} writes of a cache", writes)
        plain = _owners(calls(module, xkv.attention.default), ("k", "v", "sliding_window"))
        planned = len(self.plan.specs) if self.kind == "prefill" else 0
        self._expect(len(plain) == planned, f"{planned} attentions without a cache", plain)
        inputs = nodes_by_role(module.graph)
        for node, cache in zip(writes, self.plan.caches, strict=True):
            given = arguments(node)
            for buffer in cache.buffers:
                held = inputs.get(buffer.name)
                named = [name for name in (f"{buffer.field}_cache", buffer.field) if name in given]
                if named and (buffer.holds == "kv" or len(named) == 1):
                    self._expect(given[named[0]] is held, f"{cache.where} to write its own buffers", [node])
                elif buffer.holds == "kv":
                    changing = [] if held is None else [user for user in held.users if held in changed_by(user)]
                    self._expect(len(changing) == 1, f"one change of {buffer.name}", changing)
                fits = held is not None and tuple(held.meta["val"].shape) == buffer.shape
                what = f"{cache.slots.slots} slots in {cache.where}"
                self._expect(fits, what, [] if held is None else [held])
                copies = (
                    [user for user in held.users if not _leaves_in_place(user)] if held and buffer.holds == "kv" else []
                )
                self._expect(not copies, f"no copy of the cache of {cache.where}", copies)
            for constant in self.plan.constants[cache]:
                read = given[constant.field]
                inside = isinstance(read, Node) and read.op == "get_attr" and read.target == constant.name
                self._expect(inside, f"the constant {constant.name} in {cache.where}", [node])
            if self.kind != "decode":
                planned = cache.slots.capacity
                self._expect(given["capacity"] == planned, f"capacity {planned} in {cache.where}", [node])
        self._check_recurrences(module, inputs)
        masks = [node for node in module.graph.nodes if self.kind != "decode" and _is_pair_mask(node)]
        self._expect(not masks, "no mask over all pairs of tokens", masks)
        return PassRecord(self.name, len(writes), 0)

    def _check_recurrences(self, module: GraphModule, inputs: dict[str, Node]) -> None:
        """Every state is changed once, by what its layer leaves behind the tokens."""
        plain = [site.node for site in recurrence_sites(module)]
        self._expect(not plain, "no recurrent layer without its state", plain)
        for state in self.plan.recurrences:
            for buffer in state.buffers:
                held = inputs.get(buffer.name)
                what = f"one change of {buffer.name}, of the shape {list(buffer.shape)}"
                fits = held is not None and tuple(held.meta["val"].shape) == buffer.shape
                changing = [] if held is None else [user for user in held.users if _changes(user, held)]
                self._expect(fits and len(changing) == 1, what, changing)

    def _expect(self, holds: bool, what: str, nodes: list[Node]) -> None:
        if not holds:
            names = ", ".join(node.name for node in nodes) or "none"
            raise PassError(f"the {self.kind} graph is not as planned: expected {what}, found {names}")


def _owners(attentions: list[Node], cached: tuple[str, ...]) -> list[Node]:
    """The attentions that own a cache; the others run other queries over the same cache as an earlier one."""
    queries: dict[tuple[object, ...], set[object]] = {}
    owners = []
    for node in attentions:
        named = arguments(node)
        earlier = queries.setdefault(tuple(named.get(name) for name in cached), set())
        if not earlier or named["q"] in earlier:
            owners.append(node)
        earlier.add(named["q"])
    return owners


def _changes(user: Node, state: Node) -> bool:
    """Whether a node changes a state in place; graphs of prompts do so in a call of the layer itself."""
    return state in changed_by(user) or isinstance(user.target, PromptCall)


def _is_pair_mask(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return False
    rows, columns = value.shape[-2:]
    if not isinstance(rows, torch.SymInt) or not isinstance(columns, torch.SymInt):
        return False
    return bool(rows.node.expr.free_symbols & columns.node.expr.free_symbols)


def _leaves_in_place(user: Node) -> bool:
    """Whether a node that takes a cache is one of ours; anything else might copy it."""
    return user.target in READERS or getattr(user.target, "reads_cache", False)
