"""What `xkv-fx bench` measures, from its options."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from xkv_fx.hf.capture import layers_of_model
from xkv_fx.hf.models import is_hub_name, locate
from xkv_fx.public_budgets import Budgets


def plan_of(model: PreTrainedModel, plan: Path | None, fraction: float, context: int) -> Budgets:
    """The plan from a budgets file; without one every layer gets `fraction` of the context."""
    if plan is not None:
        return Budgets.load(plan)
    return Budgets.uniform(len(layers_of_model(model)), max(1, round(fraction * context)))


def place_of(name: str) -> tuple[str, str | None]:
    """Where other engines find a model: its folder and, for a GGUF file, the file's name; or its name on the Hub."""
    if is_hub_name(name):
        return name, None
    folder, gguf = locate(name)
    return str(folder), gguf
