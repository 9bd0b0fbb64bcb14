"""For a scorer that reads prompts again: what is kept and returned is of the first reading."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch.fx import GraphModule

from xkv_fx.passes.base import GraphPass, PassRecord
from xkv_fx.passes.tools.inline import inline
from xkv_fx.passes.tools.roles import FED, LENGTH, give_role, take_role
from xkv_fx.runtime.reading import Reading


@dataclasses.dataclass(frozen=True)
class ReadAgain(GraphPass):
    """Before: `CompactPadding` has run, and the graph is fed each text twice, as `Reading.twice` arranges it. After:
    the role `length` is that of the tokens of the first reading, so that later passes keep and return these alone; the
    role `fed` is that of both."""

    reading: Reading
    name: ClassVar[str] = "read_again"

    def run(self, module: GraphModule) -> PassRecord:
        graph = module.graph
        both = take_role(graph, LENGTH)
        with graph.inserting_before(both.next):
            first = inline(graph, self.reading.first, both)
        give_role(first, LENGTH)
        give_role(both, FED)
        return PassRecord(self.name, 1, 1, f"{self.reading.gap} tokens between the readings")
