"""What was planned and what was made of it, as lines of text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xkv_fx.budgets import Plan
from xkv_fx.heads import heads_in_words
from xkv_fx.runtime.scorers import Scorer
from xkv_fx.runtime.state import CachePlan, GraphKind

if TYPE_CHECKING:  # an engine is described without the passes
    from xkv_fx.capture.facts import Shard
    from xkv_fx.passes.pipeline import TransformedGraph


def describe_plan(fingerprint: str, plan: CachePlan, scorer: Scorer, budgets: Plan) -> list[str]:
    """What was planned, as lines of text."""
    policy, source = budgets.policy, budgets.provenance
    where = f"{len(plan.layers)} layers" if plan.groups is None else f"{len(plan.groups)} caches by KV head"
    lines = [
        f"model         {fingerprint}",
        f"plan          {source.allocator or 'by hand'}, {budgets.total_tokens} slots in {where}",
        f"policy        scorer {scorer}, eviction {policy.eviction}, recent "
        f"{'min(64, C/4)' if policy.recent is None else policy.recent}, sinks {policy.sinks}",
        f"rows          {plan.rows}",
        f"dtype         {plan.dtype} on {plan.device}",
        f"KV bytes      {plan.kv_bytes:,} a session, and {plan.state_bytes:,} for positions and counters",
        *describe_recurrences(plan),
    ]
    means = [mean for mean in plan.mean_keys or () if mean is not None]
    if means:
        size, owners = sum(mean.values.nbytes for mean in means), "layers" if plan.groups is None else "caches"
        lines.append(
            f"mean keys     of {len(means)} {owners}, constants of the graphs ({size:,} bytes, once), taken off keys "
            "before they are stored"
        )
    return lines


def describe_recurrences(plan: CachePlan) -> list[str]:
    """A line on the states of layers that keep no keys and values; nothing without any."""
    if not plan.recurrent:
        return []
    count = len(plan.recurrent)
    return [f"other state   {plan.other_state_bytes:,} bytes a session, in {count} recurrent layers; of fixed size"]


def describe_shard(shard: Shard) -> list[str]:
    """Nothing for a whole model."""
    if shard.size == 1:
        return []
    return [f"part          {shard.rank + 1} of {shard.size} of the model; heads and bytes are those of this process"]


def describe_layers(plan: CachePlan) -> list[str]:
    """A line for each layer, or for each group of its KV heads that has a cache."""
    lines = ["layer  slots  recent  eviction  sliding window  keys and values     bytes"]
    if plan.groups is not None:
        lines[0] += "  heads"
    for cache in plan.caches:
        slots, window = cache.slots, cache.spec.sliding_window
        used = f"{cache.layer:5}  {slots.slots:5}  {slots.recent:6}  {slots.eviction:8}"
        line = f"{used}  {'-' if window is None else window:>14}  {cache.contents:18}  {cache.kv_bytes:,}"
        lines.append(line if cache.group is None else f"{line}  {heads_in_words(cache.heads)}")
    return lines


def describe_passes(kind: GraphKind, graph: TransformedGraph) -> list[str]:
    """A line for each pass that made a graph."""
    return [
        f"passes of the {kind} graph",
        *(
            f"  {record.name:22} matched {record.matched:5} changed {record.changed:5}  {record.note}"
            for record in graph.records
        ),
    ]
