"""The last resort, which serves any call: plain torch ops that the compiler sees into."""

from __future__ import annotations

from collections.abc import Sequence

from xkv_fx.lowering.kernels.attention import ATTENTION, INDEX
from xkv_fx.lowering.kernels.kernel import Call, Kernel
from xkv_fx.lowering.kernels.linear import INT8_LINEAR, LINEAR
from xkv_fx.runtime.plain_forms import PLAIN_FORMS


def _accepts(call: Call) -> None:
    return None


def _decompose(calls: Sequence[Call]) -> None:
    for call in calls:
        call.node.target = PLAIN_FORMS[call.node.target]


def _leave(calls: Sequence[Call]) -> None:
    """They are torch's own ops."""


KERNELS = (
    Kernel(ATTENTION, "torch ops", _accepts, _decompose),
    Kernel(INDEX, "torch ops", _accepts, _decompose),
    Kernel(LINEAR, "torch ops", _accepts, _leave),
    Kernel(INT8_LINEAR, "torch ops", _accepts, _leave),
)
