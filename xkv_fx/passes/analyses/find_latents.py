"""How the keys and values of an attention are made from one latent of each token, if they are.

Nothing but movement of elements may lie between linear maps of the latent and the keys and values. To see where each
element comes from, the analysis moves numbered elements through that part of the graph.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from xkv_fx.passes.tools.dependence import Evaluation, size_at, value_inputs
from xkv_fx.passes.tools.graph import arguments, changed_by, placeholders
from xkv_fx.passes.tools.operators import CASTS, MOVES

aten = torch.ops.aten
# These move elements, whatever they are.
_PLACES = frozenset(MOVES) - frozenset((*CASTS, aten.view_as_complex.default, aten.view_as_real.default))
_PROBED = (3, 5)  # numbers of tokens at which movement is looked at


@dataclasses.dataclass(frozen=True)
class WeightRows:
    """Which rows of a weight `[heads * stride, rank]` belong to a head: `count` of its stride, from `first` on."""

    weight: Node
    heads: int
    first: int
    count: int

    def of(self, weight: Tensor) -> Tensor:
        """`[heads, count, rank]`, a view."""
        return weight.view(self.heads, -1, weight.shape[1])[:, self.first : self.first + self.count]


@dataclasses.dataclass(frozen=True)
class Latent:
    """How the keys and values of one attention are made.

    Attributes:
        latent: a value with the elements of `[rows, S, rank]`, in that order.
        rotary: `[rows, 1 or heads, S, ...]`, the part of the keys that is the same for all heads, in its first one;
            None where there is no such part.
        keys, values: what each head's part of a key, and each head's value, is made by.
        nope: where in a key the part that is made from the latent begins; the rotary one is before or behind it.
        rows, rank, key_dim: sizes.
    """

    latent: Node
    rotary: Node | None
    keys: WeightRows
    values: WeightRows
    nope: int
    rows: int
    rank: int
    key_dim: int

    @property
    def parts(self) -> tuple[Node, ...]:
        """What `join` takes."""
        return (self.latent,) if self.rotary is None else (self.latent, self.rotary)

    @property
    def size(self) -> int:
        """Elements that are cached of a token."""
        return self.rank + self.key_dim - self.keys.count

    def join(self, latent: Tensor, rotary: Tensor | None = None) -> Tensor:
        """Latent and rotary key side by side, `[rows, 1, S, size]`."""
        latent = latent.reshape(self.rows, 1, -1, self.rank)
        return latent if rotary is None else torch.cat((latent, rotary[:, :1]), 3)

    def queries(self, q: Tensor, weight: Tensor) -> Tensor:
        """Queries `[rows, heads, S, key_dim]` as those of the latent, `[rows, heads, S, size]`."""
        end = self.nope + self.keys.count
        over_latent = _by_head(q[..., self.nope : end], self.keys.of(weight))
        return torch.cat((over_latent, q[..., end:] if self.nope == 0 else q[..., : self.nope]), 3)

    def outputs(self, out: Tensor, weight: Tensor) -> Tensor:
        """Each head's mean of what is cached, `[rows, heads, S, size]`, as that of its values."""
        return _by_head(out[..., : self.rank], self.values.of(weight).transpose(1, 2)).contiguous()


def _by_head(states: Tensor, weights: Tensor) -> Tensor:
    """`[rows, heads, S, n]` by `[heads, n, m]`, all rows of a head at once, so that no weight is repeated."""
    rows, heads, length, size = states.shape
    flat = states.transpose(0, 1).reshape(heads, rows * length, size)
    return torch.bmm(flat, weights).view(heads, rows, length, weights.shape[2]).transpose(0, 1)


def find_latent(module: GraphModule, written: set[Node], keys: Node, values: Node) -> Latent | None:
    """How keys `[rows, heads, S, key_dim]` and values `[rows, heads, S, value_dim]` are made; None where it is not
    proved that they come from a latent.

    Args:
        written: what is changed in place, as `written_in_place` says.
    """
    value_moves, value_sources = _moved_from(values)
    key_moves, key_sources = _moved_from(keys)
    if len(value_sources) != 1 or not _is_linear(value_sources[0]):
        return None
    of_values = value_sources[0]
    latent: Node = of_values.args[0]  # type: ignore[assignment]
    of_keys = [source for source in key_sources if _is_linear(source) and source.args[0] is latent]
    if len(of_keys) != 1 or len({node.meta["val"].dtype for node in (keys, values, latent)}) != 1:
        return None
    looked_at = {*value_moves, *value_sources, *key_moves, *key_sources}.union(*_moved_from(latent))
    if looked_at & written:
        return None
    movement = _Movement(module, keys, values, of_keys[0], of_values)
    origins = [movement.origins(tokens) for tokens in _probed(keys)]
    if origins[0] is None or any(other != origins[0] for other in origins):
        return None
    (nope, count), key_row, value_row, rotary = origins[0]
    rows, heads, _, key_dim = keys.meta["val"].shape
    return Latent(
        latent=latent,
        rotary=rotary,
        keys=WeightRows(_weight(of_keys[0]), heads, key_row, count),
        values=WeightRows(_weight(of_values), heads, value_row, values.meta["val"].shape[3]),
        nope=nope,
        rows=rows,
        rank=latent.meta["val"].shape[-1],
        key_dim=key_dim,
    )


def written_in_place(graph: Graph) -> set[Node]:
    """What an op changes in place, and what that is a view of."""
    targets = [target for node in graph.nodes for target in changed_by(node)]
    return set(targets).union(*(nodes for target in targets for nodes in _moved_from(target)))


@dataclasses.dataclass(frozen=True)
class _Movement:
    """The way from linear maps to the keys and values of an attention, on which elements are only moved."""

    module: GraphModule
    keys: Node
    values: Node
    of_keys: Node
    of_values: Node

    def origins(self, tokens: int) -> tuple[tuple[int, int], int, int, Node | None] | None:
        """Where elements come from when a row has so many tokens.

        Returns:
            beginning and size of the part of a key that is made from the latent, the row of a head's stride in the
            weight that this part begins with, that which values begin with, and the node that is the other part of the
            keys; None where elements come from elsewhere.
        """
        numbers = self._numbers(tokens)
        inputs = {node: torch.zeros(size_at(node, tokens)) for node in placeholders(self.module.graph).values()}
        moved = Evaluation(self.module, {**inputs, **numbers})
        k, v = moved.value(self.keys), moved.value(self.values)
        ours = numbers[self.of_keys]
        from_latent = ((k >= ours.min()) & (k <= ours.max()))[0, 0, 0]
        part = from_latent.nonzero()[:, 0].tolist()
        if not part or part != list(range(part[0], part[-1] + 1)) or (part[0] > 0 and part[-1] + 1 < k.shape[3]):
            return None
        key_row = _row_of_stride(k[..., from_latent], ours)
        value_row = _row_of_stride(v, numbers[self.of_values])
        if key_row is None or value_row is None:
            return None
        found = (part[0], len(part)), key_row, value_row
        rest = k[..., ~from_latent]
        if not rest.numel():
            return *found, None
        for node in self._beside():
            value = moved.value(node)
            same_shape = value.shape[:1] + value.shape[2:] == rest.shape[:1] + rest.shape[2:]
            if same_shape and torch.equal(value[:, :1].expand_as(rest), rest):
                return *found, node
        return None

    def _numbers(self, tokens: int) -> dict[Node, Tensor]:
        """A number for each element that is moved."""
        numbers: dict[Node, Tensor] = {}
        start = 0
        for source in dict.fromkeys((*_moved_from(self.keys)[1], *_moved_from(self.values)[1])):
            shape = size_at(source, tokens)
            numbers[source] = torch.arange(start, start + math.prod(shape)).view(shape)
            start += math.prod(shape)
        return numbers

    def _beside(self) -> list[Node]:
        """The nodes that keys are moved from and that are not made from the latent, the smallest first."""
        nodes = [node for found in _moved_from(self.keys) for node in found if node is not self.of_keys]
        nodes = [node for node in nodes if self.of_keys not in _moved_from(node)[1]]
        tensors = [node for node in nodes if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dim() == 4]
        return sorted(tensors, key=lambda node: math.prod(size_at(node, 1)))


def _row_of_stride(taken: Tensor, numbers: Tensor) -> int | None:
    """Which row of each head's stride in the weight makes the first of the elements `[rows, heads, S, n]`; the rows
    after it make the elements after it. None where that is not so.

    Args:
        numbers: of all outputs of the linear map, whose last dimension is heads times stride.
    """
    rows, heads, tokens, count = taken.shape
    stride, left = divmod(numbers.shape[-1], heads)
    first = int(taken[0, 0, 0, 0] - numbers.flatten()[0])
    if left or numbers.numel() != rows * tokens * heads * stride or first < 0 or first + count > stride:
        return None
    by_head = numbers.reshape(rows, tokens, heads, stride).transpose(1, 2)
    return first if torch.equal(by_head[..., first : first + count], taken) else None


def _probed(keys: Node) -> tuple[int, ...]:
    """Numbers of tokens to look at: several where their number is open."""
    length = keys.meta["val"].shape[2]
    return (length,) if isinstance(length, int) else _PROBED


def _moved_from(node: Node) -> tuple[list[Node], list[Node]]:
    """The nodes that only move elements to `node`, itself included, and those that they are moved from."""
    moves: dict[Node, None] = {}
    sources: dict[Node, None] = {}
    stack = [node]
    while stack:
        each = stack.pop()
        if each in moves or each in sources:
            continue
        if each.target in _PLACES:
            moves[each] = None
            stack.extend(
                source for source in value_inputs(each) if not isinstance(source.meta.get("val"), torch.SymInt)
            )
        else:
            sources[each] = None
    return list(moves), list(sources)


def _is_linear(node: Node) -> bool:
    """A linear map without a bias, by a weight that is there as it is."""
    if node.target is not aten.linear.default:
        return False
    weight = _weight(node)
    return arguments(node)["bias"] is None and weight.op == "get_attr" and bool(weight.meta["val"].is_contiguous())


def _weight(linear: Node) -> Node:
    weight: Node = arguments(linear)["weight"]
    return weight
