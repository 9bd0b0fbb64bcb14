"""Finding where an attention's output joins the hidden state that its queries were made from."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.analyses.find_attention import AttentionSite
from xkv_fx.passes.tools.dependence import ValueFlow


def residual_of(module: GraphModule, flow: ValueFlow, site: AttentionSite) -> tuple[Node, Node]:
    """The hidden state `[rows, S, hidden]` before an attention, and after its output was added to it.

    The latter is the first sum of a value that depends on the attention and one that its queries depend on.

    Raises:
        UnsupportedModelError: there is no such sum; the model has no residual connection around its attention.
    """
    above = flow.behind([site.q])
    below = {site.node}
    for node in module.graph.nodes:
        if node in below or not below.intersection(node.all_input_nodes):
            continue
        below.add(node)
        if node.target is torch.ops.aten.add.Tensor:
            before = [source for source in node.all_input_nodes if source in above and _shape(source) == _shape(node)]
            if len(before) == 1:
                return before[0], node
    raise UnsupportedModelError(f"the output of attention {site.layer} is not added to the hidden state it came from")


def _shape(node: Node) -> Any:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
