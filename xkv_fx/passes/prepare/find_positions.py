"""Positions that a model makes from the number of its tokens: they must follow the tokens when a cache is in use.

A model that takes no positions counts them itself, from 0 to the length of what it is given. With a cache it is given
the new tokens alone, so that whatever it made from the length is made from the position ids instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.dependence import SHORT_LENGTHS, Evaluation, ValueFlow, value_inputs
from xkv_fx.passes.tools.graph import constant, emit, placeholders, propagate
from xkv_fx.passes.tools.inline import inline

aten = torch.ops.aten
# Ops that combine a token's value with other values of the same token; an index, say, counts something else.
COMBINED_BY = (
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.mul_.Tensor,
    aten.div.Tensor,
    aten.cat.default,
    aten.where.self,
)
LARGEST_TABLE = 2**18


@dataclasses.dataclass(frozen=True)
class FindPositions(GraphPass):
    """Before: attention has been found, so that no mask is left. After: no value that has a row for each token is made
    from the length alone; such values are looked up by position id, in a table where they are no plain count.

    Attributes:
        rows: batch rows of the graph.
        longest: the longest sequence that the model has positions for: the size of the tables.

    Raises:
        UnsupportedModelError: a value that depends on how many tokens there are, not only on where each one stands.
    """

    rows: int
    longest: int | None
    name: ClassVar[str] = "find_positions"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        ids, positions = list(placeholders(graph).values())[:2]
        aware = ValueFlow(graph).dependents([ids, positions])
        found = [
            (node, users)
            for node in graph.nodes
            if node not in aware and _has_tokens(node) and (users := _users(node, aware))
        ]
        changed = 0
        for node, users in found:
            table = self._table(module, node, ids, positions)
            if bool((table == table[:1]).all()):
                continue  # the same for every token
            for user in users:
                with graph.inserting_before(user):
                    moved = self._moved(module, node, user, table, positions)
                user.replace_input_with(node, moved)
                propagate(graph, moved)
                changed += 1
        graph.eliminate_dead_code()
        return PassRecord(self.name, len(found), changed)

    def _moved(self, module: GraphModule, node: Node, user: Node, table: Tensor, positions: Node) -> Node:
        """The node's value at the position ids, the batch first, aligned to what `user` puts it together with."""
        graph, dims = module.graph, node.meta["val"].dim()
        rank = max(other.meta["val"].dim() for other in (*value_inputs(user), user) if _is_tensor(other))
        if node.target is aten.embedding.default and rank == 3 and node.args[0].op == "get_attr":  # type: ignore[union-attr]
            weight, index = node.args[:2]
            counted = self._table(module, index, *list(placeholders(graph).values())[:2])  # type: ignore[arg-type]
            if _counts(counted):
                shifted = inline(graph, _shifted(int(counted.flatten()[0])), positions)
                return emit(graph, aten.embedding.default, weight, shifted)
        has_batch = dims == rank and dims > 1 and _token_dim(node) >= 1 and table.shape[1] in (1, self.rows)
        if has_batch:
            if not bool((table == table[:, :1]).all()):
                raise UnsupportedModelError(f"{node.name} differs between rows of the batch")
            table = table[:, 0]
        before = _token_dim(node) - has_batch
        rows = constant(module, f"positions_of_{node.name}", table.contiguous())
        moved: Node = inline(graph, _looked_up(before, rank), rows, positions)
        return moved

    def _table(self, module: GraphModule, node: Node, ids: Node, positions: Node) -> Tensor:
        """The node's value for every position, tokens first."""
        if sum(isinstance(size, torch.SymInt) for size in node.meta["val"].shape) > 1:
            raise UnsupportedModelError(f"{node.name} has a value for each pair of tokens and is no attention mask")
        longest = self.longest
        if longest is None or longest > LARGEST_TABLE:
            raise UnsupportedModelError(
                f"{node.name} is made from the number of tokens, and nothing says how many there may be; let the "
                "module take its positions from position_ids"
            )
        dim = _token_dim(node)

        def rows_at(length: int) -> Tensor:
            given = torch.zeros(self.rows, length, dtype=torch.int64, device=ids.meta["val"].device)
            value: Tensor = Evaluation(module, {ids: given, positions: given}).value(node)
            return value.movedim(dim, 0)

        table = rows_at(longest)
        for length in SHORT_LENGTHS:
            if length < longest and not torch.equal(rows_at(length), table[:length]):
                raise UnsupportedModelError(
                    f"{node.name} depends on how many tokens there are, not only on where each one stands"
                )
        return table


def position_limit(module: GraphModule, rows: int) -> int | None:
    """How many positions a graph's tables have, of those looked up by position alone; None without such tables."""
    graph = module.graph
    ids, positions = list(placeholders(graph).values())[:2]
    tokens = ValueFlow(graph).dependents([ids])
    limits = []
    for node in graph.nodes:
        if node.target is not aten.embedding.default or node.args[1] in tokens:
            continue
        given = torch.arange(2, device=ids.meta["val"].device).expand(rows, -1)
        index = Evaluation(module, {ids: torch.zeros_like(given), positions: given}).value(node.args[1])
        limits.append(node.args[0].meta["val"].shape[0] - int(index.min()))
    return min(limits, default=None)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _has_tokens(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)


def _users(node: Node, aware: set[Node]) -> list[Node]:
    return [user for user in node.users if user in aware and user.target in COMBINED_BY and node in value_inputs(user)]


def _token_dim(node: Node) -> int:
    return next(dim for dim, size in enumerate(node.meta["val"].shape) if isinstance(size, torch.SymInt))


def _counts(table: Tensor) -> bool:
    flat = table.reshape(table.shape[0], -1)
    return bool((flat == flat[:1] + torch.arange(table.shape[0], device=table.device)[:, None]).all())


def _shifted(first: int) -> Callable[[Tensor], Tensor]:
    return lambda positions: positions + first if first else positions.clone()


def _looked_up(before: int, rank: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Rows of a table at positions, `[rows, 1..., S, ...]` of that rank, `before` dimensions ahead of the tokens."""

    def look_up(table: Tensor, positions: Tensor) -> Tensor:
        value = table[positions].movedim(1, 1 + before)
        return value.view(value.shape[0], *(1,) * (rank - value.dim()), *value.shape[1:])

    return look_up
