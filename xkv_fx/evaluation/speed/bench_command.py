"""What `xkv-fx bench` measures, from its options: a model and a plan."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from xkv_fx.errors import BackendError, BudgetError
from xkv_fx.evaluation.dtypes import dtype_of
from xkv_fx.hf.capture import layers_of_model
from xkv_fx.hf.models import load_model
from xkv_fx.public_budgets import Budgets


def model_and_plan(
    name: str, dtype: str, device: str, plan: Path | None, fraction: float, context: int
) -> tuple[PreTrainedModel, Budgets]:
    """Load the model, and the plan from a budgets file; without one every layer gets `fraction` of the context.

    Raises:
        BackendError: an unknown dtype or device.
        BudgetError: a fraction out of range.
        UnsupportedModelError: no model of that name.
    """
    computed_in = dtype_of(dtype)
    if device not in ("cpu", "cuda"):
        raise BackendError(f"unknown device {device!r}; choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("this torch sees no CUDA device; leave --device out to run on the CPU")
    if not 0 < fraction <= 1:
        raise BudgetError(f"fraction must be above 0 and at most 1; got {fraction}")
    model, _ = load_model(name, computed_in, device)
    if plan is not None:
        return model, Budgets.load(plan)
    return model, Budgets.uniform(len(layers_of_model(model)), max(1, round(fraction * context)))
