"""Which calls over slots of fewer bits the CPU kernel serves, and compiled models that it serves."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from ready_models import cache_plan
from tiny_models import FAMILIES, random_ids
from torch import Tensor

from xkv_fx import Budgets
from xkv_fx.hf.capture import capture
from xkv_fx.lowering.kernels.attention_coded_cpu import obstacle
from xkv_fx.lowering.program import CompiledProgram, Graphs
from xkv_fx.policy import Policy
from xkv_fx.runtime.scorers import scorer_of
from xkv_fx.runtime.session import Session
from xkv_fx.runtime.state import CachePlan

FORMATS: dict[str, Any] = {
    "llama": (("int8", "int4"), None, ("int4", "int4"), ("model", "int4")),
    "gemma2": (("int8", "int4"), ("int4", "int8")),  # soft-capped logits, sliding windows
    "gpt_oss": (("int8", "int8"), ("int8", "model")),  # sink logits
}


@functools.cache
def graphs(family: str, policy: Policy) -> Graphs:
    """Of a model with heads of sixteen elements, which the kernel for the dtype serves as well."""
    formats = FORMATS[family]
    source = capture(FAMILIES[family](len(formats), head_dim=16), rows=2, check=False)
    plain = cache_plan(source, (14,) * len(formats), policy)
    plan = CachePlan(plain.layers, plain.slots, plain.rows, plain.dtype, plain.device, formats)
    return Graphs(source, plan, scorer_of(policy))


def conversation(session: Session) -> list[Tensor]:
    logits = [session.feed(random_ids(2, 23), valid=torch.tensor([[True] * 23, [False] * 6 + [True] * 17]))]
    return logits + [session.step(random_ids(2, 1, seed=seed)) for seed in range(6)]


@pytest.mark.parametrize(
    ("family", "eviction"), [*((family, "ring") for family in FORMATS), ("gemma2", "scored"), ("gpt_oss", "scored")]
)
def test_a_compiled_model_is_served_by_it(family: str, eviction: Any) -> None:
    policy = Policy(eviction=eviction)
    compiled, eager = (CompiledProgram(graphs(family, policy), backend) for backend in ("inductor", "eager"))
    layers = len(FORMATS[family])
    assert f"{layers} layers by CPU kernel" in compiled.describe(Budgets((14,) * layers, policy=policy))
    for got, expected in zip(*map(conversation, map(Session, (compiled, eager))), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def given(**changed: Any) -> dict[str, Any]:
    q, k = torch.empty(2, 6, 1, 64), torch.empty(2, 3, 1, 64)
    codes, scales = torch.empty(2, 3, 30, 64, dtype=torch.uint8), torch.empty(2, 3, 30, 1, 2)
    buffers = {"k_cache": codes, "k_scales": scales, "v_cache": codes[..., :32], "v_scales": scales}
    arguments = {"q": q, "k": k, "v": k, **buffers, "mask": torch.empty(2, 1, 1, 30), "key_bits": 8, "value_bits": 4}
    return {**arguments, **changed}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, None),
        ({"mask": torch.empty(2, 3, 1, 30)}, None),
        ({"key_bits": 0}, None),
        ({"mask": torch.empty(2, 6, 1, 30)}, "biased attention"),
        ({"mask": torch.empty(2, 1, 1, 30).half()}, "biased attention"),
        ({"q": torch.empty(2, 6, 1, 64).double()}, "dtype torch.float64"),
        ({"v": torch.empty(2, 3, 1, 64).half()}, "queries, keys and values of different dtypes"),
        ({"v": torch.empty(2, 3, 1, 72)}, None),
        ({"v": torch.empty(2, 3, 1, 20)}, "head sizes 64 and 20 are not multiples of 8"),
        ({"key_bits": 0, "value_bits": 0}, "slots in the model's dtype by the op for fewer bits"),
        ({"v_scales": torch.empty(2, 3, 30, 1, 1)}, "slots of fp8"),
        ({"v_cache": torch.empty(2, 3, 30, 0)}, "values that are the keys"),
    ],
    ids=[
        "served",
        "mask by KV head",
        "keys in the model's dtype",
        "bias by head",
        "half bias",
        "double",
        "mixed",
        "72",
        "20",
        "0 bits",
        "fp8",
        "latents",
    ],
)
def test_what_it_does_not_serve(changed: dict[str, Any], why: str | None) -> None:
    assert obstacle(given(**changed)) == why
