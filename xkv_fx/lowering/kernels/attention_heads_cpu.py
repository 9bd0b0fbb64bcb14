"""One call on CPU for a layer whose KV heads have several caches.

Such a layer is one attention for each cache, over parts of the layer's queries, keys and values, and a concatenation of
their outputs. In one call nothing is cut up or put side by side, and threads share the slots of all caches evenly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from xkv_fx.lowering.kernels.attention import BUFFERS, DECODE, DECODE_CODED
from xkv_fx.lowering.kernels.kernel import Call
from xkv_fx.passes.tools.graph import changed_by, emit
from xkv_fx.runtime.kernels import decode_heads_cpu  # noqa: F401  (defines the operator)

aten = torch.ops.aten
HEADS_DIM = 1


@dataclasses.dataclass(frozen=True)
class Layer:
    """The attentions of a layer that one call can stand for.

    Attributes:
        calls: in the order of the graph.
        joined: the concatenation of their outputs.
        q, k, v, sink_logits: of the whole layer.
        places: of each call, which of the layer's KV heads it is for.
    """

    calls: tuple[Call, ...]
    joined: Node
    q: Node
    k: Node
    v: Node
    sink_logits: Node | None
    places: tuple[tuple[int, ...], ...]


def joined_in(node: Node) -> Node:
    """The concatenation along heads that alone reads an attention, or the attention itself without one."""
    readers = set(node.users)
    parts = {reader for reader in readers if reader.target is aten.slice.Tensor}
    readers = (readers - parts).union(*(part.users for part in parts))
    found = next(iter(readers), None)
    return found if found is not None and len(readers) == 1 and _joins_heads(found) else node


def layer_of(calls: Sequence[Call]) -> Layer | None:
    """What calls that `joined_in` puts together are of a layer; None where they cannot be one call."""
    joined = joined_in(calls[0].node)
    if len(calls) < 2 or any(call.node.target not in (DECODE, DECODE_CODED) for call in calls):
        return None
    given = [call.given for call in calls]
    nodes = {call.node: number for number, call in enumerate(calls)}
    outputs = _heads(joined)
    means = {each["key_mean"] is None for each in given if "key_mean" in each}
    alike = all(each[name] == given[0][name] for each in given for name in ("scale", "softcap"))
    if {node for node, _ in outputs} != set(nodes) or len(means) > 1 or not alike or _touched_between(calls, joined):
        return None
    q, queries = _whole([each["q"] for each in given])
    k, places = _whole([each["k"] for each in given])
    v, values = _whole([each["v"] for each in given])
    sink_logits, sinks = _whole([each["sink_logits"] for each in given], dim=0)
    if q is None or k is None or v is None:
        return None
    count: int = q.meta["val"].shape[HEADS_DIM]
    width = count // k.meta["val"].shape[HEADS_DIM]
    asked = [tuple(head * width + n for head in heads for n in range(width)) for heads in places]
    in_order = [queries[nodes[node]][place] for node, place in outputs] == list(range(count))
    has_sinks = any(each["sink_logits"] is not None for each in given)
    if values != places or queries != asked or (has_sinks and sinks != asked) or not in_order:
        return None
    return Layer(tuple(calls), joined, q, k, v, sink_logits, tuple(places))


def use(layer: Layer) -> None:
    """Put one call in the place of a layer's attentions, whose kernels have been built."""
    graph, joined = layer.joined.graph, layer.joined
    given = [call.given for call in layer.calls]
    bits = [(each.get("key_bits", 0), each.get("value_bits", 0)) for each in given]
    buffers = [each[name] for each in given for name in BUFFERS if name in each]
    means = [each["key_mean"] for each in given if each.get("key_mean") is not None]
    with graph.inserting_before(joined):
        sinks, *means = (
            None if x is None else emit(graph, aten.to.dtype, x, torch.float32) for x in (layer.sink_logits, *means)
        )
        attended = emit(
            graph, torch.ops.xkv.decode_heads_cpu.default, layer.q, layer.k, layer.v, buffers,
            [each["slot"] for each in given], [each["mask"] for each in given],
            [head for heads in layer.places for head in heads], [number for pair in bits for number in pair],
            given[0]["scale"], given[0]["softcap"], sinks, means,
        )  # fmt: skip
    joined.replace_all_uses_with(attended)
    _erase(layer)


def _joins_heads(node: Node) -> bool:
    return node.target is aten.cat.default and node.args[1:] == (HEADS_DIM,)


def _heads(node: Node, dim: int = HEADS_DIM) -> list[tuple[Node, int]]:
    """Of each place along a dimension, the tensor that it was cut out of, and its place there."""
    if node.target is aten.cat.default and node.args[1:] == (dim,):
        parts: Any = node.args[0]
        return [place for part in parts for place in _heads(part, dim)]
    if node.target is aten.slice.Tensor and len(node.args) == 4 and node.args[1] == dim:
        whole: Any
        start: Any
        end: Any
        whole, _, start, end = node.args
        return [(whole, place) for place in range(whole.meta["val"].shape[dim])[start:end]]
    return [(node, place) for place in range(node.meta["val"].shape[dim])]


def _whole(parts: Sequence[Node | None], dim: int = HEADS_DIM) -> tuple[Node | None, list[tuple[int, ...]]]:
    """The one tensor that all of these were cut out of along a dimension, and the places of each in it; None, and no
    places, without one."""
    found = [[] if part is None else _heads(part, dim) for part in parts]
    wholes = {whole for heads in found for whole, _ in heads}
    if len(wholes) != 1 or not all(found):
        return None, []
    return wholes.pop(), [tuple(place for _, place in heads) for heads in found]


def _touched_between(calls: Sequence[Call], joined: Node) -> bool:
    """Whether anything else reads or writes the caches between the first of the calls and the concatenation."""
    own = {call.node for call in calls}
    caches = {buffer for node in own for buffer in changed_by(node)}
    node = min(own).next
    while node is not joined:
        if node not in own and caches.intersection(node.all_input_nodes):
            return True
        node = node.next
    return False


def _erase(layer: Layer) -> None:
    """Erase a layer's attentions, and the parts that only they read."""
    graph, own = layer.joined.graph, {call.node for call in layer.calls}
    pending = {layer.joined}
    while pending:
        node = max(pending)  # whoever reads it is gone already, if ever
        pending.remove(node)
        if node.users or not (node in own or node.target in (aten.cat.default, aten.slice.Tensor)):
            continue
        pending |= set(node.all_input_nodes)
        graph.erase_node(node)
