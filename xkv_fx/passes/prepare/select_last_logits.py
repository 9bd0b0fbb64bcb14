"""Keeping only the token whose logits prefill returns, before the output projection spends time on the others."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xkv_fx.passes.analyses.find_projection import behind_tokenwise, is_of_tokens
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.graph import output_node, propagate
from xkv_fx.passes.tools.inline import inline
from xkv_fx.passes.tools.roles import LENGTH, with_role

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SelectLastLogits(GraphPass):
    """Before: logits `[rows, S, vocabulary]`, and `CompactPadding` has run. After: `[rows, 1, vocabulary]`, the logits
    of each row's last valid token; where the output projection is found, it runs on that token alone."""

    name: ClassVar[str] = "select_last_logits"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        length = with_role(graph, LENGTH)
        output = output_node(graph)
        logits: Any = output.args[0]
        projection = _projection(logits)
        source: Any = logits if projection is None else projection.args[0]
        user = output if projection is None else projection
        with graph.inserting_before(user):
            last = inline(graph, _last, source, length)
        user.replace_input_with(source, last)
        propagate(graph, last)
        return PassRecord(self.name, 1, 1, "" if projection else "no output projection found: all logits are computed")


def _last(values: Tensor, length: Tensor) -> Tensor:
    index = (length - 1).clamp(min=0)[:, None, None].expand(-1, 1, values.shape[2])
    return values.gather(1, index)


def _projection(logits: Node) -> Node | None:
    """The linear layer that makes the logits, if nothing but what is done to each token by itself follows it."""
    node = behind_tokenwise(logits)
    return node if node.target is aten.linear.default and is_of_tokens(node.args[0]) else None
