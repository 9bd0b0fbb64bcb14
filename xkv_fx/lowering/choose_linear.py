"""Which code each linear layer of a decode graph becomes when the graph is compiled."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xkv_fx.passes.graph import arguments, calls, emit
from xkv_fx.runtime.kernels import linear_cpu
from xkv_fx.runtime.kernels.build_cpu import DTYPES, STEP

aten = torch.ops.aten


def choose_linear(module: GraphModule) -> str:
    """Put our kernel in the place of every linear layer that it serves, one call for those of the same input, such as
    queries, keys and values. Weights are inputs of the graph.

    Returns:
        how many it serves, of how many, for people to read.

    Raises:
        BackendError: the kernel cannot be built.
    """
    linears = calls(module, aten.linear.default)
    served = [node for node in linears if _is_served(node)]
    together: dict[tuple[Node, bool], list[Node]] = {}
    for node in served:
        given = arguments(node)
        together.setdefault((given["input"], given["bias"] is None), []).append(node)
    for nodes in together.values():
        _use_kernel(module, nodes)
    module.recompile()
    return f"{len(served)} of {len(linears)} linear layers by CPU kernel, weights as they lie"


def _is_served(node: Node) -> bool:
    given = arguments(node)
    x, weight = given["input"].meta["val"], given["weight"].meta["val"]
    parameters = [given["weight"], *([] if given["bias"] is None else [given["bias"]])]
    return (
        all(_is_plain(parameter, x) for parameter in parameters)
        and x.device.type == "cpu"
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


def _use_kernel(module: GraphModule, nodes: list[Node]) -> None:
    """Replace layers of the same input, all with a bias or all without."""
    graph, given = module.graph, [arguments(node) for node in nodes]
    linear_cpu.build(nodes[0].meta["val"].dtype)
    weights, biases = ([each[name] for each in given if each[name] is not None] for name in ("weight", "bias"))
    with graph.inserting_before(nodes[0]):
        flat = emit(graph, torch.ops.xkv.linear_cpu.default, given[0]["input"], weights, biases)
        end = 0
        for node in nodes:
            shape = list(node.meta["val"].shape)
            start, end = end, end + math.prod(shape)
            part = flat if len(nodes) == 1 else emit(graph, aten.slice.Tensor, flat, 0, start, end)
            node.replace_all_uses_with(emit(graph, aten.view.default, part, shape))
    for node in nodes:
        graph.erase_node(node)
