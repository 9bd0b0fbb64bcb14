"""Which code each linear layer of a decode graph becomes when the graph is compiled."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xkv_fx.passes.tools.graph import arguments, calls, emit
from xkv_fx.runtime.kernels import linear_cpu
from xkv_fx.runtime.kernels.build_cpu import DTYPES, STEP

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What a linear layer computes: `node` is `x` times the transposed `weight`, plus the `bias`."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None = None


def choose_linear(module: GraphModule) -> str:
    """Put our kernel in the place of every linear layer that it serves, one call for those of the same input, such as
    queries, keys and values. Weights are inputs of the graph, or the whole numbers that one stands for.

    Returns:
        how many it serves, of how many, for people to read.

    Raises:
        BackendError: the kernel cannot be built.
    """
    layers = [_layer(node) for node in calls(module, aten.linear.default)]
    whole = [layer for layer in map(_whole_layer, calls(module, aten.mm.default)) if layer is not None]
    order = {node: number for number, node in enumerate(module.graph.nodes)}
    served = [layer for layer in layers if _is_served(layer)]
    served += [layer for layer in whole if _is_whole_served(layer, order)]
    together: dict[tuple[Any, ...], list[_Layer]] = {}
    for layer in served:
        key = (layer.x, layer.bias is None, layer.weight.meta["val"].dtype)
        together.setdefault(key, []).append(layer)
    for group in together.values():
        _use_kernel(module, group)
    module.recompile()
    of_int8 = f", {len(whole)} of them int8" if whole else ""
    return f"{len(served)} of {len(layers) + len(whole)} linear layers by CPU kernel, weights as they lie{of_int8}"


def _layer(node: Node) -> _Layer:
    given = arguments(node)
    return _Layer(node, given["input"], given["weight"], given["bias"])


def _whole_layer(product: Node) -> _Layer | None:
    """The layer that a matrix product is, if it is one with int8 weights, as torchao writes it: `x @ w.t().to(dtype)`,
    scaled by whoever uses it."""
    x, widened = product.all_input_nodes[0], product.all_input_nodes[-1]
    turned = widened.args[0] if widened.target is aten.to.dtype else None
    if not isinstance(turned, Node) or turned.target is not aten.t.default:
        return None
    weight: Any = turned.args[0]
    if weight.meta["val"].dtype != torch.int8:
        return None
    source = x.args[0] if x.target is aten.reshape.default else x
    if isinstance(source, Node) and source.meta["val"].shape[-1:] == x.meta["val"].shape[-1:]:
        x = source  # of which queries, keys and values each have a reshaped one
    return _Layer(product, x, weight)


def _is_served(layer: _Layer) -> bool:
    x = layer.x.meta["val"]
    parameters = [layer.weight, *([] if layer.bias is None else [layer.bias])]
    return _fits(layer) and all(_is_plain(parameter, x) for parameter in parameters)


def _is_whole_served(layer: _Layer, order: dict[Node, int]) -> bool:
    """Weights that are there before the input can be read by a call in the place of any layer of that input."""
    weight, product = layer.weight.meta["val"], layer.node.meta["val"]
    return (
        _fits(layer)
        and order[layer.weight] < order[layer.x]
        and weight.is_contiguous()
        and (product.dtype, weight.device) == (layer.x.meta["val"].dtype, product.device)
    )


def _fits(layer: _Layer) -> bool:
    x, weight = layer.x.meta["val"], layer.weight.meta["val"]
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and weight.dim() == 2
        and weight.shape[1] % STEP == 0
        and math.prod(x.shape[:-1]) <= linear_cpu.MOST_ROWS
    )


def _is_plain(parameter: Node, x: Tensor) -> bool:
    """Whether it is a tensor as it lies in memory, not one that only stands for a weight, as quantized ones do."""
    value = parameter.meta["val"]
    return (
        parameter.op == "placeholder" and type(value) is type(x) and value.is_contiguous()
        and (value.dtype, value.device) == (x.dtype, x.device)
    )  # fmt: skip


def _use_kernel(module: GraphModule, layers: list[_Layer]) -> None:
    """Replace layers of the same input, all with a bias or all without, all of them int8 or none."""
    graph, first = module.graph, layers[0]
    linear_cpu.build(first.node.meta["val"].dtype, whole=first.weight.meta["val"].dtype == torch.int8)
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    with graph.inserting_before(first.node):
        flat = emit(graph, torch.ops.xkv.linear_cpu.default, first.x, weights, biases)
        end = 0
        for layer in layers:
            shape = list(layer.node.meta["val"].shape)
            start, end = end, end + math.prod(shape)
            part = flat if len(layers) == 1 else emit(graph, aten.slice.Tensor, flat, 0, start, end)
            layer.node.replace_all_uses_with(emit(graph, aten.view.default, part, shape))
    for layer in layers:
        graph.erase_node(layer.node)
