"""Undoing the choice of the last column's logits, which is made before padding is moved out of the way."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.analyses.find_projection import TOKENWISE, behind_tokenwise
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.graph import output_node, propagate

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class OpenLastLogits(GraphPass):
    """Before: logits of the last column, `[rows, 1, vocabulary]`, which a slice between the model and its output
    projection has chosen (`logits_to_keep=1`). After: logits of every column, `[rows, S, vocabulary]`.

    Raises:
        UnsupportedModelError: the logits were not chosen by such a slice.
    """

    name: ClassVar[str] = "open_last_logits"

    def run(self, module: GraphModule) -> PassRecord:
        logits: Any = output_node(module.graph).args[0]
        node: Any = behind_tokenwise(logits, (*TOKENWISE, aten.linear.default))
        if not _takes_last_column(node):
            raise UnsupportedModelError(
                "the model returns logits of one token, but not by leaving out all others before its output projection"
            )
        node.replace_all_uses_with(node.args[0])
        propagate(module.graph, node.args[0])
        module.graph.erase_node(node)
        return PassRecord(self.name, 1, 1)


def _takes_last_column(node: Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    source, dim, start = node.args[:3]
    one = node.meta["val"].shape[1] == 1
    return bool(isinstance(source, Node) and dim == 1 and start == -1 and len(node.args) < 5 and one)
