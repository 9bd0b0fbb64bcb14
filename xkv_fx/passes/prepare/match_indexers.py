"""Finding the indexers of attentions that reach only some keys, and giving each attention what its indexer picks by.

products = queries @ keys.T                      per index head, with a factor
scores = weights @ relu(products)                [rows, S, S]
picked = topk(masked(scores, causal), k)         attention(q, k, v) over the picked keys
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch.fx import GraphModule, Node

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.dependence import SHORT_LENGTHS
from xkv_fx.passes.tools.graph import arguments, at_length, call_instead, calls
from xkv_fx.passes.tools.inline import inline
from xkv_fx.passes.tools.operators import CASTS
from xkv_fx.runtime import capture_marks, ops  # noqa: F401  (register the marks and the ops)

MOST = 2**20
"""More tokens than a prompt has."""

aten = torch.ops.aten
ATTENTION = torch.ops.xkv.attention.default
CAUSAL = torch.ops.xkv.causal_pairs.default
MASKED = torch.ops.xkv.masked_queries.default
# These leave each value where it is for its pair of tokens, or its token and head.
_SHAPES = (
    *CASTS,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.view.default,
)
_FACTORS = (aten.mul.Tensor, aten.mul.Scalar)


@dataclasses.dataclass(frozen=True)
class MatchIndexers(GraphPass):
    """Before: queries are marked with the mask that the model gives their attention, and with what is picked for them,
    if anything. After: no marks are left; an attention over what is picked has the queries, keys and weights of its
    indexer, and the number of keys that it picks.

        attention(masked_queries(q, mask, picked), k, v, ...)
            ->  attention(q, k, v, ..., index_queries, index_keys, index_weights, top_k)

    Attributes:
        top_k: how many keys each query reaches; the graph was made with a number that is larger than any prompt.

    Raises:
        UnsupportedModelError: a mask that is not the causal one, or keys that are picked in another way; the message
            names the node.
    """

    top_k: int
    name: ClassVar[str] = "match_indexers"

    def run(self, module: GraphModule) -> PassRecord:
        found: dict[Node, tuple[Node, Node, Node]] = {}
        marked = [node for node in calls(module, ATTENTION) if node.args[0].target is MASKED]  # type: ignore[union-attr]
        for node in marked:
            mark = arguments(node.args[0])  # type: ignore[arg-type]
            if mark["mask"].target is not CAUSAL:
                raise UnsupportedModelError(f"the mask of {node.name}, {mark['mask'].name}, is not the causal one")
            node.args = (mark["q"], *node.args[1:])
            picked = mark["picked"]
            if picked is None:
                continue
            given = arguments(node)
            if any(given[name] is not None for name in ("sliding_window", "slopes")):
                raise UnsupportedModelError(f"{node.name} has an indexer, and masks or biases by distance besides")
            if picked not in found:
                with module.graph.inserting_before(picked.next):
                    found[picked] = _indexer(module, picked)
            given["index_queries"], given["index_keys"], given["index_weights"] = found[picked]
            given["top_k"] = self.top_k
            call_instead(node, ATTENTION, given)
        return PassRecord(self.name, len(marked), len(found), f"{len(found)} indexers")


def _indexer(module: GraphModule, picked: Node) -> tuple[Node, Node, Node]:
    """What `Index` has, at the insertion point, of the indexer whose choice `picked` is, `[rows, S, any]`."""
    graph = module.graph
    picks = _unshaped(picked)
    top = picks.args[0] if picks.args and picks.args[1:] == (1,) else None
    if not isinstance(top, Node) or top.target is not aten.topk.default:
        raise _unknown(picks)
    ranked = arguments(top)
    scores: Any = ranked["self"]
    rows, tokens, _ = scores.meta["val"].shape
    if ranked["dim"] not in (-1, 2) or not ranked["largest"] or not _is_all(ranked["k"], tokens):
        raise _unknown(top)
    summed = _unshaped(_causally_masked(scores))
    if summed.target is not aten.matmul.default:
        raise _unknown(summed)
    rectified = _unshaped(summed.args[1])
    products, scale = _unscaled(rectified.args[0] if rectified.target is aten.relu.default else rectified)
    if rectified.target is not aten.relu.default or products.target is not aten.matmul.default or scale <= 0:
        raise _unknown(products)
    queries, keys, weights, summands = cast(tuple[Node, ...], (*products.args, *summed.args))
    heads, dim = queries.meta["val"].shape[-2:]
    of_pairs = (rows, tokens, heads, tokens)
    expected = ((queries, (rows, tokens, heads, dim)), (keys, (rows, 1, dim, tokens)), (products, of_pairs),
                (rectified, of_pairs), (summands, of_pairs), (weights, (rows, tokens, 1, heads)))  # fmt: skip
    for node, shape in expected:  # on the way from one to the next, values keep their order
        if not _has_shape(node, shape):
            raise _unknown(node)
    narrow = [_unshaped(operand).meta["val"].dtype for operand in (queries, keys)]
    return (
        inline(graph, lambda values: values.transpose(1, 2).to(narrow[0]), queries),
        inline(graph, lambda values: values.transpose(2, 3).to(narrow[1]), keys),
        inline(graph, lambda values: values.squeeze(2).float() * scale, weights),
    )


def _causally_masked(scores: Node) -> Node:
    """The scores before those of later keys were made minus infinity, and those alone."""
    if scores.target not in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        raise _unknown(scores)
    source, later, value = scores.args
    hidden = _unshaped(later)
    seen = _unshaped(hidden.args[0]) if hidden.target in (aten.bitwise_not.default, aten.logical_not.default) else None
    while seen is not None and seen.target in (aten.select.int, aten.slice.Tensor):
        if seen.meta["val"].shape[-2:] != seen.args[0].meta["val"].shape[-2:]:  # type: ignore[union-attr]
            raise _unknown(seen)
        seen = _unshaped(seen.args[0])
    if seen is None or seen.target is not CAUSAL or value != float("-inf"):
        raise _unknown(scores)
    return source  # type: ignore[return-value]


def _unscaled(values: Any) -> tuple[Node, float]:
    """Values before they were multiplied by numbers, and the product of these."""
    factor = 1.0
    node = _unshaped(values)
    while node.target in _FACTORS and isinstance(node.args[1], int | float):
        factor *= node.args[1]
        node = _unshaped(node.args[0])
    return node, factor


def _unshaped(values: Any) -> Node:
    """Values before they were cast or given another shape."""
    node: Node = values
    while node.target in _SHAPES:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_all(count: Any, tokens: Any) -> bool:
    """Whether a count is the number of tokens, whatever that is."""
    if not isinstance(count, Node) or not isinstance(tokens, torch.SymInt):
        return bool(count == tokens)
    formula = _formula(count.meta["val"])
    return formula.free_symbols == {tokens.node.expr} and all(
        at_length(formula, n) == n for n in (*SHORT_LENGTHS, MOST)
    )


def _has_shape(node: Any, shape: Sequence[Any]) -> bool:
    return isinstance(node, Node) and list(map(_formula, node.meta["val"].shape)) == list(map(_formula, shape))


def _formula(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _unknown(node: Node) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{node.name} ({node.target}), of an indexer, is not understood; known are indexers that pick the keys of the "
        "highest sum of weights times rectified products"
    )
