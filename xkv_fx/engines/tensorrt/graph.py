"""The decode graph in the form that TensorRT has layers for, as a `torch.export.ExportedProgram`; needs no TensorRT."""

from __future__ import annotations

import copy
import operator
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from xkv_fx.engines.tensorrt.build import returned_by, written_in_place
from xkv_fx.engines.trace import check_plain
from xkv_fx.errors import BackendError, first_line
from xkv_fx.passes.tools.graph import arguments, calls, output_node, placeholders
from xkv_fx.passes.tools.roles import nodes_by_role
from xkv_fx.runtime.ops import attend_and_count, attend_slots
from xkv_fx.runtime.state import CachePlan

_DECODE = torch.ops.xkv.decode_attention.default
_SCORED = torch.ops.xkv.decode_scored.default


def tensorrt_form(decode: GraphModule, plan: CachePlan) -> GraphModule:
    """Write each token's K/V so that TensorRT updates its caches in place, and leave the counting to the caller.

    ```
    before  xkv.decode_attention(q, k, v, k_cache, v_cache, slot, mask, ...); seen += 1; return logits
    after   k_cache.index_copy_(2, slot, k); v_cache.index_copy_(2, slot, v); scaled_dot_product_attention(...)
    ```

    With several rows, or eviction by score, each row or KV head writes to a slot of its own, for which Torch-TensorRT
    has no update in place. Then the caller writes, and attention sees the token beside the caches:

    ```
    after   scaled_dot_product_attention(q, where(slots == slot, k, k_cache), where(slots == slot, v, v_cache), ...)
            return logits, then what `tensorrt.returned_by` names
    ```

    Args:
        decode: of the decode pipeline; it stays as it is, and shares its weights.
        plan: of its caches.
    """
    form = GraphModule(decode, copy.deepcopy(decode.graph))
    inputs = nodes_by_role(form.graph)
    seen = inputs["seen"]
    for node in calls(form, torch.ops.aten.add_.Tensor):
        if node.args[0] is seen:
            form.graph.erase_node(node)
    if written_in_place(plan):
        _write_in_place(form)
    else:
        _return_the_token(form, plan)
    form.graph.lint()
    form.recompile()
    return form


def _write_in_place(form: GraphModule) -> None:
    written: set[object] = set()
    for node in calls(form, _DECODE):
        cache = arguments(node)["k_cache"]
        node.target = _attend if cache in written else _write_and_attend  # one that borrows its K/V finds them there
        written.add(cache)


def _return_the_token(form: GraphModule, plan: CachePlan) -> None:
    inputs = nodes_by_role(form.graph)
    cache_of = {inputs[buffer.name]: cache for cache in plan.caches for buffer in cache.buffers}
    returned: dict[str, Node] = {}
    for node in [node for node in form.graph.nodes if node.target in (_DECODE, _SCORED)]:
        given = arguments(node)
        parts = {"k": given["k"], "v": given["v"]}
        if node.target is _DECODE:
            node.target = _attend_beside
        else:
            parts["slot"] = given["slot"]
            node.target = _attend_and_count_beside
            _, parts["scores"] = _unpacked(node, 2)
        names = {part.field: part.name for part in cache_of[given["k_cache"]].returned_parts()}
        # of attentions that share a cache, the first one's
        returned = {names[field]: part for field, part in parts.items() if field in names} | returned
    output = output_node(form.graph)
    output.args = ((output.args[0], *(returned[part.name] for part in returned_by(plan))),)


def _unpacked(node: Node, count: int) -> list[Node]:
    """The parts of a tuple, the first of which takes the place that the node had."""
    users = list(node.users)
    with node.graph.inserting_after(node):
        parts = [node.graph.call_function(operator.getitem, (node, index)) for index in reversed(range(count))][::-1]
    for user in users:
        user.replace_input_with(node, parts[0])
    return parts


def trace_for_tensorrt(decode: GraphModule, plan: CachePlan) -> ExportedProgram:
    """Trace `tensorrt_form` of a decode graph, its weights the program's parameters, all shapes static.

    Raises:
        BackendError: it cannot be traced, or the plan stores slots in fewer bits.
    """
    if plan.formats is not None:
        raise BackendError(
            "the target 'tensorrt' stores keys and values in the model's dtype; export a plan without formats, or "
            "choose the target 'aoti'"
        )
    form = tensorrt_form(decode, plan)
    values = [node.meta["val"] for node in placeholders(form.graph).values()]
    examples = tuple(torch.zeros(value.shape, dtype=value.dtype, device=value.device) for value in values)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            program = torch.export.export(form, examples, strict=False)
    except Exception as error:  # torch.export raises errors of many kinds
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


def _beside(slot: Tensor, token: Tensor, cache: Tensor) -> Tensor:
    """A buffer of slots as it will be once the token is written.

    Args:
        slot: int64 `[rows, kv_heads or 1]`.
        token: `[rows, kv_heads, 1, ...]`.
        cache: `[rows, kv_heads, slots, ...]`.
    """
    here = torch.arange(cache.shape[2], device=cache.device) == slot[..., None]
    return torch.where(here[..., None] if cache.dim() == 4 else here, token, cache)


def _attend_beside(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, *arguments: Any, **options: Any
) -> Tensor:
    """`xkv::decode_attention` that writes nothing."""
    k_cache = _beside(slot[:, None], k, k_cache)
    if v_cache.shape[-1]:
        v_cache = _beside(slot[:, None], v, v_cache)
    return attend_slots(q, k_cache, v_cache, *arguments, **options)


def _attend_and_count_beside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scores: Tensor,
    slot: Tensor,
    mask: Tensor,
    seen: Tensor,
    *arguments: Any,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`xkv::decode_scored` that writes nothing: its output, and the scores afterwards."""
    k_cache = _beside(slot, k, k_cache)
    if v_cache.shape[-1]:
        v_cache = _beside(slot, v, v_cache)
    scores = _beside(slot, torch.zeros((), device=scores.device), scores)
    out, attention = attend_and_count(q, k_cache, v_cache, mask, *arguments, **options)
    return out, scores + attention
