"""The plain functions that stand for our ops where a compiler is to see into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from xkv_fx.runtime.coded_ops import CODED_DECOMPOSITIONS
from xkv_fx.runtime.indexed_ops import INDEXED_DECOMPOSITIONS
from xkv_fx.runtime.ops import DECOMPOSITIONS

PLAIN_FORMS: Mapping[Any, Callable[..., Tensor | None]] = {
    **DECOMPOSITIONS,
    **CODED_DECOMPOSITIONS,
    **INDEXED_DECOMPOSITIONS,
}
"""By the ops."""
