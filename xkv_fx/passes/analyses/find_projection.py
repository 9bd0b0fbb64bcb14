"""Finding what logits are made from: the way back through what is done to each token by itself."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten
# Applied to each token by itself, so that choosing a token before or after them is the same.
TOKENWISE = (
    aten.tanh.default,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.contiguous.default,
)


def behind_tokenwise(node: Node, operators: Collection[Any] = TOKENWISE) -> Node:
    """The first node on the way back that does not call one of `operators`, or calls one on other than exactly one
    value of tokens."""
    while node.op == "call_function" and node.target in operators:
        of_tokens = [source for source in node.all_input_nodes if is_of_tokens(source)]
        if len(of_tokens) != 1:
            return node
        node = of_tokens[0]
    return node


def is_of_tokens(node: object) -> bool:
    """Whether a node's value has the dimensions of a hidden state, `[rows, S, dim]`."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.dim() == 3
