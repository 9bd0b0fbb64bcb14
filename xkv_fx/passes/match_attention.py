"""Finding attention that a model writes out, and making each one the node that a captured attention is.

    scores = q @ k.T;  weights = softmax(f(scores));  weights @ v          scaled_dot_product_attention(q, k, v, mask)

`f` scales, adds a bias and masks. It may use sizes, positions and weights, but nothing that depends on the tokens, and
works on each pair of query and key by itself: both are read off the graph. What it does is then found by running it on
given scores at several lengths, and what is not a scale, a linear bias of the distance, and causality (over all tokens
or a sliding window) is refused.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.clean_graph import remove_dead_code
from xkv_fx.passes.dependence import Evaluation, behind, dependents, size_at, value_inputs
from xkv_fx.passes.graph import arguments, constant, emit, inline, placeholders
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
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)
# Each pair of query and key by itself.
ELEMENTWISE = (
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
# Logits this far down get a weight of exactly 0.
MASKED = -1e4
LENGTHS = (2, 3, 17)
PROBED = 40
LONGEST = 4096


@dataclasses.dataclass(frozen=True)
class WrittenAttention:
    """One attention as the model writes it.

    Attributes:
        output: the node that it ends in.
        q, k, v: `[rows, heads, S, head_dim]` or `[rows * heads, S, head_dim]`.
        chain: the nodes from the products of queries and keys to what the softmax is taken of; empty for
            `scaled_dot_product_attention`.
        keys_turned: `k` has its last two dimensions exchanged.
        mask: of `scaled_dot_product_attention`.
        causal: its own flag.
        scale: its own factor.
    """

    output: Node
    q: Node
    k: Node
    v: Node
    chain: tuple[Node, ...] = ()
    keys_turned: bool = False
    mask: Node | None = None
    causal: bool = False
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Reach:
    """What scaling, bias and mask of an attention come to.

    Attributes:
        scale: factor on the products.
        sliding_window: the newest tokens that a query sees, its own included; None for all.
        slopes: float32 `[query_heads]`, what a logit loses for each token of distance; None for nothing.
    """

    scale: float
    sliding_window: int | None = None
    slopes: Tensor | None = None


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
        dependent = dependents(graph, [ids])
        found = [match for node in graph.nodes if (match := match_written(node, dependent)) is not None]
        prover = Prover(module, ids, positions, self.rows, self.longest)
        for index, (written, reach) in enumerate([(written, prover.reach(written)) for written in found]):
            self._replace(module, written, reach, index)
        remove_dead_code(graph)
        return PassRecord(self.name, len(found), len(found))

    def _replace(self, module: GraphModule, written: WrittenAttention, reach: Reach, index: int) -> None:
        graph, node = module.graph, written.output
        k, keys_turned = _unturn(written.k) if written.keys_turned else (written.k, False)
        with graph.inserting_before(node):
            q = inline(graph, _heads(self.rows, False), _uncast(written.q))
            k = inline(graph, _heads(self.rows, keys_turned), _unrepeat(graph, _uncast(k)))
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
    return WrittenAttention(output, q, k, v, tuple(chain), keys_turned=True)


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
        if node.target not in (*ELEMENTWISE, *RESHAPES, *CASTS):
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


class Prover:
    """Finds out what masks and biases do, by running the part of the graph that makes them."""

    def __init__(self, module: GraphModule, ids: Node, positions: Node, rows: int, longest: int | None) -> None:
        self.module, self.ids, self.positions, self.rows = module, ids, positions, rows
        self.longest = longest
        self.tokens = dependents(module.graph, [ids])
        self._at: dict[int, Evaluation] = {}

    def reach(self, written: WrittenAttention) -> Reach:
        """What an attention's queries see, and how.

        Raises:
            UnsupportedModelError: more than its past, less than a sliding window of it, or through anything else than
                a scale and a bias that is linear in the distance.
        """
        where = written.output.name
        if not written.chain and written.mask is None:
            if not written.causal:
                raise UnsupportedModelError(f"{where} attends to all tokens, not to the past alone")
            return Reach(written.scale)
        first, *others = [self._reach_at(written, length) for length in self._lengths(written)]
        windows = {reach.sliding_window for reach in others} - {None}  # not seen at lengths that are shorter
        if len(windows) > 1:
            raise UnsupportedModelError(f"the mask of {where} is no sliding window of one size")
        return dataclasses.replace(first, sliding_window=next(iter(windows), None))

    def _lengths(self, written: WrittenAttention) -> list[int]:
        """Lengths that show everything: beyond each number that positions are compared with, and each table's end."""
        made_from = {source for node in written.chain for source in node.all_input_nodes} | {written.mask}
        unaware = [node for node in made_from if node is not None and node not in self.tokens]
        lengths = set(LENGTHS)
        limit = min(self.longest or LONGEST, LONGEST)
        for node in behind(self.module.graph, unaware):
            if node.op == "get_attr" and max(node.meta["val"].shape, default=0) > 1:
                lengths.add(limit)
            for number in _whole_numbers(node):
                if number > LONGEST and (self.longest is None or number < self.longest):
                    raise UnsupportedModelError(
                        f"{node.name}, in the mask of {written.output.name}, has the number {number}; masks are proven "
                        f"up to {LONGEST} tokens"
                    )
                lengths.add(number + 2)
        return [min(PROBED, limit), *sorted({min(length, limit) for length in lengths})]

    def _reach_at(self, written: WrittenAttention, length: int) -> Reach:
        where = written.output.name
        logits = self._logits(written, length, 0.0)
        seen = logits > MASKED
        window = _window(seen, where)
        scale = self._scale(written, logits, seen) if length <= PROBED else written.scale
        queries = slice(None) if length <= PROBED else slice(-1, None)  # the last one has every distance
        position = torch.arange(length)
        distance = (position[queries, None] - position[None]).double()
        seen, own = seen[:, :, queries], logits.diagonal(dim1=2, dim2=3)[:, :, queries, None]
        bias = (logits[:, :, queries] - own).double()
        farthest = min(length, window or length) - 1
        slopes = -bias[0, :, -1, length - 1 - farthest] / max(farthest, 1)
        error = (bias + slopes[None, :, None, None] * distance)[seen].abs()
        size = float(logits[:, :, queries][seen].abs().max())
        if bool((error > 8 * torch.finfo(written.output.meta["val"].dtype).eps * max(1.0, size)).any()):
            raise UnsupportedModelError(f"the bias of {where} is not linear in the distance of two tokens")
        return Reach(scale, window, slopes.float() if bool((slopes.abs() > 1e-6).any()) else None)

    def _scale(self, written: WrittenAttention, unscored: Tensor, seen: Tensor) -> float:
        """The number that scores are multiplied by, given the logits without any."""
        if not written.chain:
            return written.scale
        where, length = written.output.name, unscored.shape[-1]
        scale = float((self._logits(written, length, 1.0) - unscored)[seen].median())
        noise = torch.randn(self._scores_shape(written, length), generator=torch.Generator().manual_seed(length))
        got = self._logits(written, length, noise.double())
        expected = scale * noise.double().view(got.shape) + unscored
        if not torch.allclose(got[seen], expected[seen], rtol=1e-4, atol=1e-4 * max(1.0, abs(scale))):
            raise UnsupportedModelError(f"the logits of {where} are not its scores times a number plus a bias")
        if bool((got[~seen] > MASKED).any()):
            raise UnsupportedModelError(f"the mask of {where} lets some scores through")
        return scale

    def _scores_shape(self, written: WrittenAttention, length: int) -> tuple[int, ...]:
        return size_at(written.chain[0], length)

    def _logits(self, written: WrittenAttention, length: int, scores: float | Tensor) -> Tensor:
        """What the softmax is taken of, `[rows, query_heads, length, length]`, for given scores."""
        dtype = torch.float64 if length <= PROBED else torch.float32
        known = self._evaluation(length)
        if not written.chain:
            mask = known.value(written.mask)  # type: ignore[arg-type]
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask.cpu(), float("-inf"))
            heads = size_at(written.q, length)[1]
            mask = mask.to(dtype).cpu()
            mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
            if written.causal:
                mask = mask + torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
            whole: Tensor = mask.expand(self.rows, heads, length, length)
            return whole
        products = written.chain[0]
        shape = self._scores_shape(written, length)
        value: Any = torch.full(shape, scores, dtype=dtype) if isinstance(scores, float) else scores
        value = value.to(self.positions.meta["val"].device)
        if products.target is aten.baddbmm.default:
            given = arguments(products)
            value = given["beta"] * known.value(given["self"]).to(dtype) + given["alpha"] * value
        for before, node in itertools.pairwise(written.chain):
            if node.target not in CASTS:
                value = known.run(node, {before: value})
        logits: Tensor = value.to(dtype).cpu().reshape(self.rows, -1, length, length)
        return logits

    def _evaluation(self, length: int) -> Evaluation:
        if length not in self._at:
            device = self.positions.meta["val"].device
            positions = torch.arange(length, device=device).expand(self.rows, -1).contiguous()
            self._at[length] = Evaluation(
                self.module, {self.ids: torch.zeros_like(positions), self.positions: positions}
            )
        return self._at[length]


def _window(seen: Tensor, where: str) -> int | None:
    """The sliding window of a mask `[rows, heads, S, S]`, None if every query sees all of its past."""
    length = seen.shape[-1]
    if bool((seen != seen[:1, :1]).any()):
        raise UnsupportedModelError(f"the mask of {where} differs between rows or heads")
    mask = seen[0, 0]
    position = torch.arange(length)
    distance = position[:, None] - position[None]
    if bool(mask[distance < 0].any()):
        raise UnsupportedModelError(f"{where} attends to tokens that come later; only causal attention has a KV cache")
    window = int(mask[-1].sum())
    if not torch.equal(mask, (distance >= 0) & (distance < window)):
        raise UnsupportedModelError(f"the mask of {where} is neither causal nor a sliding window")
    return None if window == length else window


def _whole_numbers(node: Node) -> list[int]:
    """The numbers that a node compares positions with, or adds to them."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.is_floating_point():
        return []
    return [
        abs(arg) for arg in node.args if isinstance(arg, int) and not isinstance(arg, bool) and 1 < abs(arg) < 2**31
    ]


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


def _unturn(node: Node) -> tuple[Node, bool]:
    """Keys before their last two dimensions were exchanged, and whether that is still to be undone."""
    last = node.meta["val"].dim() - 1
    source: Any = node.args[0]
    if node.target is aten.transpose.int and {dim % (last + 1) for dim in _whole(node.args[1:])} == {last - 1, last}:
        return source, False
    return node, True


def _whole(values: Any) -> list[int]:
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


def _heads(rows: int, turned: bool) -> Callable[[Tensor], Tensor]:
    def heads(values: Tensor) -> Tensor:
        values = values.transpose(-1, -2) if turned else values
        return values if values.dim() == 4 else values.unflatten(0, (rows, -1))

    return heads


def _as_dtype(like: Node) -> Callable[[Tensor], Tensor]:
    return lambda values: values.to(like.meta["val"].dtype)


def _shaped(like: Node) -> Callable[[Tensor], Tensor]:
    value = like.meta["val"]
    return lambda attended: (attended if value.dim() == 4 else attended.flatten(0, 1)).to(value.dtype)
