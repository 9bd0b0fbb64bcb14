"""The attention of a decode step, as kernels see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from xkv_fx.lowering.kernels.kernel import Op
from xkv_fx.passes.tools.graph import arguments
from xkv_fx.runtime import coded_ops, ops  # noqa: F401  (register the ops)

DECODE = torch.ops.xkv.decode_attention.default
DECODE_SCORED = torch.ops.xkv.decode_scored.default
DECODE_CODED = torch.ops.xkv.decode_coded.default
DECODE_CODED_SCORED = torch.ops.xkv.decode_coded_scored.default


def _read(node: Node) -> Mapping[str, Any] | None:
    targets = (DECODE, DECODE_SCORED, DECODE_CODED, DECODE_CODED_SCORED)
    return arguments(node) if node.target in targets else None


ATTENTION = Op("attention", _read, "{served} layers")
"""Calls of `xkv::decode_attention`, `xkv::decode_scored` and their forms for slots of fewer bits, with
their arguments."""
