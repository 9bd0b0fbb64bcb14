"""Finding attention that a model writes out, and making each one the node that a captured attention is.

    scores = q @ k.T;  weights = softmax(f(scores));  weights @ v          scaled_dot_product_attention(q, k, v, mask)

`f` scales, adds a bias and masks. It may use sizes, positions and weights, but nothing that depends on the tokens, and
works on each pair of query and key by itself: both are read off the graph. What it does is then found by `Prover`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.analyses.prove_reach import Prover, Reach, WrittenAttention
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.prepare.clean_graph import remove_dead_code
from xkv_fx.passes.tools.dependence import ValueFlow, value_inputs
from xkv_fx.passes.tools.graph import arguments, constant, emit, placeholders
from xkv_fx.passes.tools.inline import inline
from xkv_fx.passes.tools.operators import CASTS
from xkv_fx.runtime import ops  # noqa: F401  (registers the ops)

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten.special_softmax.default)
FUSED = (
    aten._native_multi_head_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.expand.default,
)
# Each pair of query and key by itself.
PAIRWISE = (
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.sub.Tensor,
    aten.sub_.Tensor,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.mul_.Tensor,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.div_.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Scalar,
    aten.maximum.default,
    aten.max.other,
    aten.clamp.default,
)


@dataclasses.dataclass(frozen=True)
class MatchAttention(GraphPass):
    """Before: a graph of `(input_ids, position_ids)` in which attention is written out. After: each one is an
    `xkv::attention` node on K/V that are not repeated; its mask and bias are gone.

    Attributes:
        rows: batch rows of the graph.
        longest: the longest sequence that the model has positions for; None if unbounded.

    Raises:
        UnsupportedModelError: an attention that is not proven to be causal, or that does anything else; the message
            names the node.
    """

    rows: int
    longest: int | None = None
    name: ClassVar[str] = "match_attention"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        ids, positions = list(placeholders(graph).values())[:2]
        flow = ValueFlow(graph)
        dependent = flow.dependents([ids])
        found = [match for node in graph.nodes if (match := match_written(node, dependent)) is not None]
        prover = Prover(module, flow, ids, positions, self.rows, self.longest)
        for index, (written, reach) in enumerate([(written, prover.reach(written)) for written in found]):
            self._replace(module, written, reach, index)
        remove_dead_code(graph)
        return PassRecord(self.name, len(found), len(found))

    def _replace(self, module: GraphModule, written: WrittenAttention, reach: Reach, index: int) -> None:
        graph, node = module.graph, written.output
        k, keys_transposed = _untransposed(written.k) if written.keys_transposed else (written.k, False)
        with graph.inserting_before(node):
            q = inline(graph, _heads(self.rows, False), _uncast(written.q))
            k = inline(graph, _heads(self.rows, keys_transposed), _unrepeat(graph, _uncast(k)))
            v = inline(graph, _heads(self.rows, False), _unrepeat(graph, _uncast(written.v)))
            q, k = (inline(graph, _as_dtype(v), source) for source in (q, k))
            slopes = (
                ()
                if reach.slopes is None
                else (constant(module, f"slopes_{index}", reach.slopes.to(v.meta["val"].device)),)
            )
            attended = emit(
                graph, torch.ops.xkv.attention.default, q, k, v, index, reach.scale, reach.sliding_window,
                *((None, None, *slopes) if slopes else ()),
            )  # fmt: skip
            result = inline(graph, _shaped(node), attended)
        node.replace_all_uses_with(result)


def match_written(node: Node, dependent: set[Node]) -> WrittenAttention | None:
    """The attention that has this softmax or `scaled_dot_product_attention` at its heart; None for any other node.

    Args:
        dependent: the nodes whose values depend on the tokens.

    Raises:
        UnsupportedModelError: it is attention, but not of a form that can be taken over.
    """
    if node.target is aten.scaled_dot_product_attention.default:
        return _match_fused(node, dependent)
    if node.target in FUSED:
        raise UnsupportedModelError(f"{node.name} is a fused attention, {node.target}, that cannot be looked into")
    if node.target not in SOFTMAX or not _over_tokens(node):
        return None
    chain = _chain_to_products(node, dependent)
    products = chain[0]
    operands = list(products.args[1:3] if products.target is aten.baddbmm.default else products.args[:2])
    output, v = _weighted_sum(node)
    q, k = (operand for operand in operands if isinstance(operand, Node))
    return WrittenAttention(output, q, k, v, tuple(chain), keys_transposed=True)


def _match_fused(node: Node, dependent: set[Node]) -> WrittenAttention:
    given = arguments(node)
    if given["dropout_p"]:
        raise UnsupportedModelError(f"{node.name} drops attention weights at random; switch dropout off")
    mask, q = given["attn_mask"], given["query"]
    if mask is not None and mask in dependent:
        raise UnsupportedModelError(f"the mask of {node.name}, {mask.name}, depends on the tokens")
    scale = q.meta["val"].shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    return WrittenAttention(node, q, given["key"], given["value"], (), False, mask, given["is_causal"], float(scale))


def _chain_to_products(softmax: Node, dependent: set[Node]) -> list[Node]:
    """The nodes from the products of queries and keys up to the argument of a softmax."""
    chain: list[Node] = []
    node: Any = softmax.args[0]
    while True:
        if not _over_pairs(node):
            raise UnsupportedModelError(
                f"{node.name}, in the logits of {softmax.name}, is not one value a pair of tokens"
            )
        chain.insert(0, node)
        sources = [source for source in node.all_input_nodes if source in dependent]
        if node.target in PRODUCTS:
            operands = node.args[1:3] if node.target is aten.baddbmm.default else node.args[:2]
            if len(sources) == 2 and all(operand in dependent for operand in operands):
                return chain
        if node.target not in (*PAIRWISE, *RESHAPES, *CASTS):
            raise UnsupportedModelError(
                f"{node.name}, in the logits of {softmax.name}, is {node.target}, which is not understood there"
            )
        if len(sources) != 1:
            names = ", ".join(source.name for source in sources)
            raise UnsupportedModelError(
                f"{node.name}, in the logits of {softmax.name}, mixes values that depend on the tokens: {names}"
            )
        node = sources[0]


def _weighted_sum(softmax: Node) -> tuple[Node, Node]:
    """The product of a softmax with the values, and the values."""
    node = softmax
    while True:
        users = [user for user in node.users if node in value_inputs(user)]
        if len(users) != 1:
            names = ", ".join(user.name for user in users) or "nothing"
            raise UnsupportedModelError(f"the attention weights {node.name} are used by {names}, not by values alone")
        user = users[0]
        if user.target in (aten.matmul.default, aten.bmm.default) and user.args[0] is node:
            values = user.args[1]
            if isinstance(values, Node):
                return user, values
        if user.target is aten.dropout.default and user.args[2]:
            raise UnsupportedModelError(f"{user.name} drops attention weights at random; switch dropout off")
        if user.target not in (*RESHAPES, *CASTS, aten.dropout.default) or not _over_pairs(user):
            raise UnsupportedModelError(f"{user.name} changes the attention weights {node.name}; it is {user.target}")
        node = user


def _over_tokens(softmax: Node) -> bool:
    """Whether a softmax runs over tokens; one over experts, say, has a fixed size."""
    value = softmax.meta["val"]
    dim = softmax.args[1]
    return isinstance(dim, int) and isinstance(value.shape[dim], torch.SymInt)


def _over_pairs(node: Node) -> bool:
    value = node.meta["val"]
    return value.dim() >= 3 and all(isinstance(size, torch.SymInt) for size in value.shape[-2:])


def _uncast(node: Node) -> Node:
    """The same values before they were cast to a wider type; the op accumulates in float32 by itself."""
    source = node.args[0] if node.target in CASTS else None
    if isinstance(source, Node) and source.meta["val"].dtype.itemsize <= node.meta["val"].dtype.itemsize:
        return source
    return node


def _untransposed(node: Node) -> tuple[Node, bool]:
    """Keys before their last two dimensions were exchanged, and whether that is still to be undone."""
    last = node.meta["val"].dim() - 1
    source: Any = node.args[0]
    if node.target is aten.transpose.int and {dim % (last + 1) for dim in _ints(node.args[1:])} == {last - 1, last}:
        return source, False
    return node, True


def _ints(values: Any) -> list[int]:
    return [value for value in values if isinstance(value, int)]


def _unrepeat(graph: Graph, node: Node) -> Node:
    """K/V `[rows, kv_heads, S, head_dim]` before they were repeated for the query heads of their group."""
    source: Any = node
    if node.target is aten.repeat_interleave.self_int and node.args[2:] == (1,):
        return node.args[0]  # type: ignore[return-value]
    if node.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints):
        source = node.args[0]
        while source.target in (aten.clone.default, aten.contiguous.default):
            source = source.args[0]
    if source is node or source.target is not aten.expand.default:
        return node
    base, repeated, shape = source.args[0], source.meta["val"].shape, node.meta["val"].shape
    if len(repeated) != 5 or len(shape) != 4 or base.meta["val"].shape[2] != 1 or repeated[1] * repeated[2] != shape[1]:
        return node
    unrepeated: Node = inline(graph, lambda values: values.squeeze(2), base)
    return unrepeated


def _heads(rows: int, transposed: bool) -> Callable[[Tensor], Tensor]:
    def heads(values: Tensor) -> Tensor:
        values = values.transpose(-1, -2) if transposed else values
        return values if values.dim() == 4 else values.unflatten(0, (rows, -1))

    return heads


def _as_dtype(like: Node) -> Callable[[Tensor], Tensor]:
    return lambda values: values.to(like.meta["val"].dtype)


def _shaped(like: Node) -> Callable[[Tensor], Tensor]:
    value = like.meta["val"]
    return lambda attended: (attended if value.dim() == 4 else attended.flatten(0, 1)).to(value.dtype)
