"""Linear layers on CPU by our C++ kernel, one call for those of the same input, such as queries, keys and values.

Weights are inputs of the graph; int8 weights may be tensors inside an input, as with torchao.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from xkv_fx.lowering.kernels.kernel import Call, Kernel
from xkv_fx.lowering.kernels.linear import INT8_LINEAR, LINEAR
from xkv_fx.passes.tools.graph import emit
from xkv_fx.runtime.kernels import linear_cpu
from xkv_fx.runtime.kernels.build_cpu import DTYPES, STEP

aten = torch.ops.aten


def _accepts(call: Call) -> str | None:
    given, x = call.given, call.values["x"]
    parameters = [parameter for parameter in (given["weight"], given["bias"]) if parameter is not None]
    return _misfit(call) or next(filter(None, (_not_plain(parameter, x) for parameter in parameters)), None)


def _accepts_int8(call: Call) -> str | None:
    given, values = call.given, call.values
    weight, product = values["weight"], call.node.meta["val"]
    misfit = _misfit(call)
    if misfit is not None:
        return misfit
    if not given["weight"] < given["x"]:  # the call stands in the place of the first layer of that input
        return "weights that are made later than their input"
    if not weight.is_contiguous():
        return "weights that are not contiguous"
    if weight.device != product.device:
        return f"weights on {weight.device}"
    if product.dtype != values["x"].dtype:
        return f"dtype {product.dtype} of inputs in {values['x'].dtype}"
    return None


def _misfit(call: Call) -> str | None:
    x, weight = call.values["x"], call.values["weight"]
    rows = math.prod(x.shape[:-1])
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    if weight.dim() != 2:
        return f"weights of {weight.dim()} dimensions"
    if weight.shape[1] % STEP:
        return f"{weight.shape[1]} inputs are not a multiple of {STEP}"
    if rows > linear_cpu.MOST_ROWS:
        return f"{rows} rows are more than {linear_cpu.MOST_ROWS}"
    return None


def _not_plain(parameter: Node, x: Tensor) -> str | None:
    """Why a weight or bias cannot be read where the model holds it."""
    value = parameter.meta["val"]
    if parameter.op != "placeholder":
        return "a weight or bias that the graph computes"
    if type(value) is not type(x):
        return f"a weight or bias that is a {type(value).__name__}"
    if not value.is_contiguous():
        return "a weight or bias that is not contiguous"
    if (value.dtype, value.device) != (x.dtype, x.device):
        return f"a weight or bias of {value.dtype} on {value.device}"
    return None


def _together(call: Call) -> Hashable:
    """Layers of one input, all with a bias or all without."""
    return call.given["x"], call.given["bias"] is None


def _use(calls: Sequence[Call]) -> None:
    given = [call.given for call in calls]
    x, first = given[0]["x"], calls[0].node
    linear_cpu.build(first.meta["val"].dtype, int8=given[0]["weight"].meta["val"].dtype == torch.int8)
    weights = [layer["weight"] for layer in given]
    biases = [layer["bias"] for layer in given if layer["bias"] is not None]
    graph = first.graph
    with graph.inserting_before(first):
        flat = emit(graph, torch.ops.xkv.linear_cpu.default, x, weights, biases)
        end = 0
        for call in calls:
            shape = list(call.node.meta["val"].shape)
            start, end = end, end + math.prod(shape)
            part = flat if len(calls) == 1 else emit(graph, aten.slice.Tensor, flat, 0, start, end)
            call.node.replace_all_uses_with(emit(graph, aten.view.default, part, shape))
    for call in calls:
        graph.erase_node(call.node)


KERNEL = Kernel(LINEAR, "CPU kernel", _accepts, _use, device="cpu", together=_together)
INT8_KERNEL = Kernel(INT8_LINEAR, "CPU kernel", _accepts_int8, _use, device="cpu", together=_together)
