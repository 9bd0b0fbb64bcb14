"""What `xkv-fx bench` does with its options: a model, a plan, a bench."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from xkv_fx.budgets import Budgets, layers_of
from xkv_fx.errors import BackendError, BudgetError
from xkv_fx.evaluation.bench import Settings, run_bench
from xkv_fx.evaluation.bench_result import Bench
from xkv_fx.hf.models import load_model, locate

DTYPES = ("float32", "bfloat16", "float16")


def bench_model(
    name: str,
    dtype: str,
    device: str,
    context: int,
    rows: int,
    plan: Path | None,
    fraction: float,
    rounds: int,
    new_tokens: int,
    only: tuple[str, ...],
    backend: str,
    prefill: bool | None,
    pythons: Mapping[str, Path | None],
    progress: Callable[[str], None],
) -> Bench:
    """Load the model and measure it; `plan` is a budgets file, without one every layer gets `fraction` of the context.

    Raises:
        BackendError: an unknown dtype, device or contestant, or a backend without its compiler.
        BudgetError: sizes out of range, or more than memory holds.
        UnsupportedModelError: no model of that name.
    """
    if dtype not in DTYPES:
        raise BackendError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if device not in ("cpu", "cuda"):
        raise BackendError(f"unknown device {device!r}; choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("this torch sees no CUDA device; leave --device out to run on the CPU")
    if not 0 < fraction <= 1:
        raise BudgetError(f"fraction must be above 0 and at most 1; got {fraction}")
    folder, gguf = locate(name)
    model, _ = load_model(name, getattr(torch, dtype), device)
    tokens = max(1, round(fraction * context))
    budgets = Budgets.uniform(len(layers_of(model)), tokens) if plan is None else Budgets.load(plan)
    settings = Settings(
        context=context,
        rows=rows,
        budgets=budgets,
        rounds=rounds,
        new_tokens=new_tokens,
        only=only,
        backend=backend,
        prefill=prefill,
        pythons={engine: str(python) for engine, python in pythons.items() if python is not None},
        folder=str(folder),
        gguf=gguf,
    )
    return run_bench(model, settings, progress)
