"""The attention of a decode step, as kernels see it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.fx import Node

from xkv_fx.lowering.kernels.kernel import Op
from xkv_fx.passes.tools.graph import arguments
from xkv_fx.runtime import coded_ops, indexed_ops, ops  # noqa: F401  (register the ops)

DECODE = torch.ops.xkv.decode_attention.default
DECODE_SCORED = torch.ops.xkv.decode_scored.default
DECODE_CODED = torch.ops.xkv.decode_coded.default
DECODE_CODED_SCORED = torch.ops.xkv.decode_coded_scored.default
CODED = (DECODE_CODED, DECODE_CODED_SCORED)
BUFFERS = ("k_cache", "k_scales", "v_cache", "v_scales")
"""Arguments that hold a cache; scales only over slots of fewer bits."""


def _read(node: Node) -> Mapping[str, Any] | None:
    return arguments(node) if node.target in (DECODE, DECODE_SCORED, *CODED) else None


ATTENTION = Op("attention", _read, "{served} layers")
"""Calls of `xkv::decode_attention`, `xkv::decode_scored` and their forms for slots of fewer bits, with
their arguments."""


def _read_index(node: Node) -> Mapping[str, Any] | None:
    return arguments(node) if node.target is torch.ops.xkv.pick_slots.default else None


INDEX = Op("index", _read_index, "the indexers of {served} layers")
"""Calls of `xkv::pick_slots`, with their arguments."""


def misfit(given: Mapping[str, Any], dtypes: Collection[torch.dtype]) -> str | None:
    """Why no kernel of ours serves an attention with these arguments, whatever its shapes; None where one may.

    Args:
        dtypes: those that the kernel takes.
    """
    q, coded = given["q"], "key_bits" in given
    if q.dtype not in dtypes:
        return f"dtype {q.dtype}"
    if any(given[name].dtype != q.dtype for name in (("k", "v") if coded else ("k", "v", "k_cache", "v_cache"))):
        return "queries, keys and values of different dtypes"
    if not given["v_cache"].shape[3]:
        return "values that are the keys"
    if coded and not (given["key_bits"] or given["value_bits"]):
        return "slots in the model's dtype by the op for fewer bits"
    return None
