"""Putting layers that mix tokens by a state in the place of what export has left of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch.fx import GraphModule

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.graph import arguments, calls
from xkv_fx.runtime.recurrence import Recurrence


@dataclasses.dataclass(frozen=True)
class BindRecurrences(GraphPass):
    """Before: a graph as `torch.export` leaves it. After: each such layer is a call of its `Recurrence`.

        xkv.recurrence([hidden, ...], index, width)  ->  recurrence(hidden, ...)

    Raises:
        UnsupportedModelError: the graph runs other layers than those that were found, or in another order.
    """

    recurrences: Sequence[Recurrence]
    name: ClassVar[str] = "bind_recurrences"

    def run(self, module: GraphModule) -> PassRecord:
        found = calls(module, torch.ops.xkv.recurrence.default)
        order = [arguments(node)["index"] for node in found]
        if order != list(range(len(self.recurrences))):
            raise UnsupportedModelError(
                f"export kept {len(order)} of the {len(self.recurrences)} recurrent layers that ran, or changed their "
                "order"
            )
        for node, recurrence in zip(found, self.recurrences, strict=True):
            node.target, node.args, node.kwargs = recurrence, tuple(arguments(node)["inputs"]), {}
        return PassRecord(self.name, len(found), len(found))
