"""The linear layers of a decode step, as kernels see them: `x` times the transposed `weight`, plus `bias` if any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from xkv_fx.lowering.kernels.kernel import Op
from xkv_fx.passes.tools.graph import arguments

aten = torch.ops.aten


def _read(node: Node) -> Mapping[str, Any] | None:
    if node.target is not aten.linear.default:
        return None
    given = arguments(node)
    return {"x": given["input"], "weight": given["weight"], "bias": given["bias"]}


def _read_int8(node: Node) -> Mapping[str, Any] | None:
    """A product with int8 weights as torchao writes it, `x @ weight.t().to(dtype)`; whoever uses it scales it."""
    if node.target is not aten.mm.default:
        return None
    x, widened = node.all_input_nodes[0], node.all_input_nodes[-1]
    transposed = widened.args[0] if widened.target is aten.to.dtype else None
    if not isinstance(transposed, Node) or transposed.target is not aten.t.default:
        return None
    weight: Any = transposed.args[0]
    if weight.meta["val"].dtype != torch.int8:
        return None
    source = x.args[0] if x.target is aten.reshape.default else x
    if isinstance(source, Node) and source.meta["val"].shape[-1:] == x.meta["val"].shape[-1:]:
        x = source  # queries, keys and values each reshape it for themselves
    return {"x": x, "weight": weight, "bias": None}


LINEAR = Op("linear layer", _read, "{served} of {total} linear layers")
INT8_LINEAR = Op("linear layer of int8", _read_int8, "{served} of {total} linear layers of int8")
