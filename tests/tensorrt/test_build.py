"""Engines of TensorRT-RTX, built for GPUs that are not there; running them needs one, and has not been tested."""

from __future__ import annotations

import json
from typing import Any

import pytest
import ready_models
import torch

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.engines.records import TensorRTBuild
from xkv_fx.engines.tensorrt.build import build_engine, caches_of, written_in_place
from xkv_fx.engines.tensorrt.graph import trace_for_tensorrt
from xkv_fx.hf.models import load_model

CAPABILITIES = ("sm_80", "sm_89", "sm_120")
LAYERS = 30


def built(llm: Any, *capabilities: str) -> tuple[int, TensorRTBuild]:
    """Bytes of an engine, and what it is made of."""
    program = trace_for_tensorrt(llm.decode, llm.program.plan)
    plan = llm.program.plan
    engine, build = build_engine(program, len(caches_of(plan)) if written_in_place(plan) else 0, capabilities)
    print(json.dumps({"gpus": capabilities, "bytes": engine.nbytes, **vars(build)}))
    return engine.nbytes, build


def check_native(build: TensorRTBuild, layers: int) -> None:
    assert build.library == "tensorrt_rtx"
    assert build.caches_in_place == 2 * layers
    assert build.native_attentions == layers
    assert build.left_to_torch == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_tiny_llama(capability: str) -> None:
    size, build = built(ready_models.transformed(Budgets((12, 16))), capability)
    assert size > 0
    check_native(build, 2)


@pytest.mark.parametrize(
    ("policy", "native"), [(Policy(), 2), (Policy(eviction="scored", sinks=1), 0)], ids=["ring", "scored"]
)
def test_several_rows_whose_caches_the_caller_writes(policy: Policy, native: int) -> None:
    llm = ready_models.transformed(Budgets((12, 16), policy), rows=3)
    size, build = built(llm, CAPABILITIES[1])
    assert size > 0
    assert (build.caches_in_place, build.native_attentions, build.left_to_torch) == (0, native, 0)


def test_one_engine_for_several_gpus() -> None:
    llm = ready_models.transformed(Budgets((12, 16)))
    one, _ = built(llm, CAPABILITIES[0])
    size, build = built(llm, *CAPABILITIES)
    assert one <= size < 2 * one
    check_native(build, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_smollm2(dtype: torch.dtype) -> None:
    model, _ = load_model("smollm2")
    model = model.to(dtype)
    budgets = Budgets(tuple(128 + 16 * (layer % 3) for layer in range(LAYERS)))
    llm = xkv_fx.transform(model, budgets, backend="eager")
    size, build = built(llm, *CAPABILITIES)
    weights = sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in model.parameters()}.values())
    assert size < weights + 40e6
    check_native(build, LAYERS)
