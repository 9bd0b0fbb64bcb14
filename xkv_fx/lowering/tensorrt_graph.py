"""The decode graph in the form that TensorRT has layers for, as a `torch.export.ExportedProgram`; needs no TensorRT."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from xkv_fx.errors import BackendError, first_line
from xkv_fx.lowering.trace_program import check_plain
from xkv_fx.passes.graph import arguments, calls, placeholders
from xkv_fx.runtime.ops import attend_slots

_OURS = torch.ops.xkv.decode_attention.default


def tensorrt_form(decode: GraphModule) -> GraphModule:
    """Write each token's K/V so that TensorRT updates its caches in place, and leave the counting to the caller.

    ```
    before  xkv.decode_attention(q, k, v, k_cache, v_cache, slot, mask, ...); seen += 1
    after   k_cache.index_copy_(2, slot, k); v_cache.index_copy_(2, slot, v); scaled_dot_product_attention(...)
    ```

    Args:
        decode: of the decode pipeline; it stays as it is, and shares its weights.

    Raises:
        BackendError: several rows, or eviction by score: each then writes to slots of its own, for which Torch-TensorRT
            has no update in place.
    """
    inputs = placeholders(decode.graph)
    rows = int(inputs["seen"].meta["val"].shape[0])
    if rows != 1:
        raise BackendError(
            f"Torch-TensorRT updates caches in place for one row only, and this model was transformed for {rows}; "
            "transform it with batch_size=1, or choose the target 'aoti'"
        )
    if calls(decode, torch.ops.xkv.decode_scored.default):
        raise BackendError(
            "under eviction='scored' each KV head writes to a slot of its own, for which Torch-TensorRT has no update "
            "in place; choose eviction='ring', or the target 'aoti'"
        )
    form = GraphModule(decode, copy.deepcopy(decode.graph))
    seen = placeholders(form.graph)["seen"]
    for node in calls(form, torch.ops.aten.add_.Tensor):
        if node.args[0] is seen:
            form.graph.erase_node(node)
    written: set[object] = set()
    for node in calls(form, _OURS):
        cache = arguments(node)["k_cache"]
        node.target = _attend if cache in written else _write_and_attend  # one that borrows its K/V finds them there
        written.add(cache)
    form.recompile()
    return form


def trace_for_tensorrt(decode: GraphModule) -> ExportedProgram:
    """Trace `tensorrt_form` of a decode graph, its weights the program's parameters, all shapes static.

    Raises:
        BackendError: it cannot be traced, or as `tensorrt_form`.
    """
    form = tensorrt_form(decode)
    values = [node.meta["val"] for node in placeholders(form.graph).values()]
    examples = tuple(torch.zeros(value.shape, dtype=value.dtype, device=value.device) for value in values)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            program = torch.export.export(form, examples, strict=False)
    except Exception as error:
        raise BackendError(f"the decode graph cannot be traced for TensorRT ({first_line(error)})") from error
    check_plain(program, "the model")
    return program


def _write_and_attend(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, *arguments: Any, **options: Any
) -> Tensor:
    """`xkv::decode_attention` for one row."""
    k_cache.index_copy_(2, slot, k)
    if v_cache.shape[-1]:
        v_cache.index_copy_(2, slot, v)
    return attend_slots(q, k_cache, v_cache, *arguments, **options)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, *arguments: Any, **options: Any
) -> Tensor:
    """The same, where the token's K/V are in the caches already; TensorRT updates a cache once."""
    return attend_slots(q, k_cache, v_cache, *arguments, **options)
