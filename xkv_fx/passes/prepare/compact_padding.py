"""Padding as one more input: a row's valid tokens are moved to its front, where causal attention needs no mask."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.graph import add_input, at_end, at_start, output_node, placeholders
from xkv_fx.passes.tools.inline import inline
from xkv_fx.passes.tools.roles import LENGTH, VALID, give_role


@dataclasses.dataclass(frozen=True)
class CompactPadding(GraphPass):
    """Before: inputs `input_ids, position_ids`. After: a third input `valid`, bool `[rows, S]`; the graph works on rows
    whose valid tokens come first, so that no valid query ever reaches padding; the roles `valid` and `length` name that
    input and the number of each row's valid tokens.

    Attributes:
        restore_order: move the logits of every token back to where the token stood.
    """

    restore_order: bool
    name: ClassVar[str] = "compact_padding"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        ids, positions = placeholders(graph).values()
        value = ids.meta["val"]
        valid = add_input(graph, "valid", value.shape, torch.bool, value.device)
        give_role(valid, VALID)
        uses = {node: list(node.users) for node in (ids, positions)}
        with at_start(graph):
            length, place, *moved = inline(graph, _to_the_front, valid, *uses)
            length._rename("length")
            give_role(length, LENGTH)
        for (node, users), front in zip(uses.items(), moved, strict=True):
            for user in users:
                user.replace_input_with(node, front)
        if self.restore_order:
            output = output_node(graph)
            logits: Any = output.args[0]
            with at_end(graph):
                output.args = (inline(graph, _back, logits, place),)
        return PassRecord(self.name, 2, len(uses), "padding may stand before or after a row's tokens")


def places(valid: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens each row has `[rows]`, and where each goes `[rows, S]` when a row's tokens come first."""
    length = valid.sum(1)
    so_far = valid.cumsum(1)
    padding_so_far = torch.arange(1, valid.shape[1] + 1, device=valid.device) - so_far
    return length, torch.where(valid, so_far, length[:, None] + padding_so_far) - 1


def _to_the_front(valid: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What `places` returns, and the inputs arranged accordingly."""
    length, place = places(valid)
    return length, place, *(torch.zeros_like(values).scatter(1, place, values) for values in inputs)


def _back(logits: Tensor, place: Tensor) -> Tensor:
    return logits.gather(1, place[..., None].expand(-1, -1, logits.shape[2]))
