"""Which token ids a graph can take."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from xkv_fx.passes.tools.graph import calls, placeholders


def known_tokens(graph: GraphModule, vocabulary: int) -> int:
    """How many token ids the embedding knows; the size of the logits where there is no embedding."""
    ids = next(iter(placeholders(graph.graph).values()))
    rows = [
        int(node.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
        for node in calls(graph, torch.ops.aten.embedding.default)
        if node.args[1] is ids
    ]
    return min(rows, default=vocabulary)
