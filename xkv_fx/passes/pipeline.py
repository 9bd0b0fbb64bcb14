"""The order of the passes, as data: lists that can be printed, extended and run one by one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

from torch.fx import GraphModule

from xkv_fx.layers import LayerSpec
from xkv_fx.passes.analyses.find_attention import any_latent
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.cache.check_cache import CheckCache
from xkv_fx.passes.cache.insert_decode_cache import InsertDecodeCache
from xkv_fx.passes.cache.insert_extend_cache import InsertExtendCache
from xkv_fx.passes.cache.insert_prefill_cache import InsertPrefillCache
from xkv_fx.passes.measure.add_statistics import AddStatistics
from xkv_fx.passes.measure.score_outputs import ScoreOutputs
from xkv_fx.passes.prepare.clean_graph import CleanGraph
from xkv_fx.passes.prepare.compact_padding import CompactPadding
from xkv_fx.passes.prepare.expand_latents import ExpandLatents
from xkv_fx.passes.prepare.read_again import ReadAgain
from xkv_fx.passes.prepare.select_last_logits import SelectLastLogits
from xkv_fx.passes.prepare.split_heads import SplitHeads
from xkv_fx.runtime.scorers import Scorer, reading_of
from xkv_fx.runtime.state import CachePlan


@dataclasses.dataclass(frozen=True)
class TransformedGraph:
    """A graph and what each pass did to it."""

    module: GraphModule
    records: tuple[PassRecord, ...]


def prefill_pipeline(plan: CachePlan, scorer: Scorer, all_logits: bool = False) -> tuple[GraphPass, ...]:
    """`(input_ids, position_ids)` -> `(input_ids, position_ids, valid, *state)`, starting from empty caches."""
    return (
        CleanGraph(),
        CompactPadding(restore_order=all_logits),
        *_read_again(scorer),
        *(() if all_logits else (SelectLastLogits(),)),
        *_split(plan),
        InsertPrefillCache(plan, scorer),
        *((ExpandLatents(),) if any_latent(plan.layers) else ()),
        CheckCache(plan, "prefill"),
    )


def extend_pipeline(plan: CachePlan, scorer: Scorer, all_logits: bool = False) -> tuple[GraphPass, ...]:
    """The same, going on from what the caches hold."""
    return (
        CleanGraph(),
        CompactPadding(restore_order=all_logits),
        *_read_again(scorer),
        *(() if all_logits else (SelectLastLogits(),)),
        *_split(plan),
        InsertExtendCache(plan, scorer),
        CheckCache(plan, "extend"),
    )


def _read_again(scorer: Scorer) -> tuple[GraphPass, ...]:
    reading = reading_of(scorer)
    return () if reading is None else (ReadAgain(reading),)


def decode_pipeline(plan: CachePlan) -> tuple[GraphPass, ...]:
    """`(input_ids, position_ids)` of one token a row -> `(input_ids, position_ids, *state)`."""
    return (CleanGraph(), *_split(plan), InsertDecodeCache(plan), CheckCache(plan, "decode"))


def _split(plan: CachePlan) -> tuple[GraphPass, ...]:
    return () if plan.groups is None else (SplitHeads(plan.groups),)


def profile_pipeline(
    scorer: Scorer, statistics: tuple[str, ...] = (), layers: Sequence[LayerSpec] = ()
) -> tuple[GraphPass, ...]:
    """`(input_ids, position_ids)` -> `(input_ids, position_ids, valid)` to the scores of every layer, then to each
    statistic of every layer.

    Args:
        layers: what the layers cache; without them, attention over latents stays so.
    """
    return (
        CleanGraph(),
        CompactPadding(restore_order=False),
        *((AddStatistics(statistics),) if statistics else ()),
        ScoreOutputs(scorer),
        *((ExpandLatents(),) if any_latent(layers) else ()),
    )


@dataclasses.dataclass(frozen=True)
class PassStep:
    """One pass of a pipeline, and the graph as it left it.

    Attributes:
        record: what it did, and how long it took.
        module: the graph behind it; it shares the weights, and runs.
    """

    record: PassRecord
    module: GraphModule

    def __str__(self) -> str:
        record = self.record
        return f"{record.name}: matched {record.matched}, changed {record.changed}, {record.seconds * 1e3:.1f} ms"

    def print_readable(self) -> str:
        """Print the graph, as `torch.fx.GraphModule.print_readable` does; returns what is printed."""
        return self.module.print_readable()


def run_stepwise(module: GraphModule, passes: Sequence[GraphPass]) -> tuple[PassStep, ...]:
    """As `run_pipeline`, with a copy of the graph after every pass."""
    steps = []
    for graph_pass in passes:
        record = graph_pass.rewrite(module)
        steps.append(PassStep(record, GraphModule(module, copy.deepcopy(module.graph))))
    return tuple(steps)


def run_pipeline(module: GraphModule, passes: Sequence[GraphPass]) -> TransformedGraph:
    """Run passes in order on `module`, in place; it is recompiled once, after the last."""
    records = tuple(graph_pass.rewrite(module) for graph_pass in passes)
    module.recompile()
    return TransformedGraph(module, records)
