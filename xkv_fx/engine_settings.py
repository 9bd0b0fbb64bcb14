"""Capacities in the settings of other inference engines, which keep the newest tokens only, and sinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from xkv_fx.errors import BudgetError

_RECENCY = "keeps the newest tokens of each layer, not those that the plan's scorer ranks highest"
_OPENVINO_BLOCK = 32


def engine_settings(engine: str, capacities: Sequence[int], sinks: int) -> tuple[dict[str, Any], str]:
    """Settings of that engine, and what is lost; see `Budgets.to`.

    Args:
        capacities: slots of each layer.
        sinks: first tokens that are always kept.

    Raises:
        BudgetError: an unknown engine, or capacities too small for its blocks.
    """
    if engine not in _ENGINES:
        raise BudgetError(f"unknown engine {engine!r}; choose one of {', '.join(_ENGINES)}")
    return _ENGINES[engine](capacities, sinks)


def _for_tensorrt_llm(capacities: Sequence[int], sinks: int) -> tuple[dict[str, Any], str]:
    settings: dict[str, Any] = {"max_attention_window": list(capacities)}
    if sinks:
        settings["sink_token_length"] = sinks
    return settings, f"TensorRT-LLM {_RECENCY}"


def _for_executorch(capacities: Sequence[int], sinks: int) -> tuple[dict[str, Any], str]:
    lost = f"; the {sinks} sinks of the plan are not kept" if sinks else ""
    return {"layer_sizes": list(capacities)}, f"ExecuTorch {_RECENCY}{lost}"


def _for_openvino(capacities: Sequence[int], sinks: int) -> tuple[dict[str, Any], str]:
    """Sizes are whole blocks, and besides the first and newest tokens OpenVINO needs at least one block to evict."""
    block, mean = _OPENVINO_BLOCK, sum(capacities) / len(capacities)
    start = max(1, -(-sinks // block)) * block
    most = sum(capacities) // len(capacities) // block * block
    recent = most - start - block
    if recent < block:
        raise BudgetError(
            f"a mean of {mean:.0f} slots a layer is too small for OpenVINO, which needs {start + 2 * block}: the first "
            f"{start}, the newest {block} and a block of {block} to evict"
        )
    return (
        {"start_size": start, "recent_size": recent, "max_cache_size": most},
        "OpenVINO has one size for all layers, so the capacities of single layers are lost; it keeps the first and the "
        "newest tokens, and one block between them by its own scores",
    )


_ENGINES: dict[str, Callable[[Sequence[int], int], tuple[dict[str, Any], str]]] = {
    "tensorrt-llm": _for_tensorrt_llm,
    "executorch": _for_executorch,
    "openvino": _for_openvino,
}
