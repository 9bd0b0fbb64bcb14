"""What is allocated keeps the limit in bytes that a plan was solved for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import ready_models
import torch

import xkv_fx
from xkv_fx import Budgets, Policy, Profile
from xkv_fx.budgets import Provenance
from xkv_fx.errors import BudgetError, FileFormatError
from xkv_fx.lowering.program import compile_program
from xkv_fx.planning.measure.verify import single_formats_like, uniform_like


def profiled(eviction: Any) -> Profile:
    captured = ready_models.captured("llama", 2, 1)
    curves = np.linspace(0, 1, 201, dtype=np.float32)[None].repeat(2, 0)
    return Profile((curves,), Policy(eviction=eviction), captured.layers, captured.fingerprint)


def allocated(plan: Budgets, rows: int = 1, **options: Any) -> int:
    return compile_program(ready_models.captured("llama", 2, rows), plan, "eager", **options).plan.kv_bytes


def test_room_is_inside_the_limit() -> None:
    plan = xkv_fx.solve(profiled("append"), kv_bytes="20KB", max_new_tokens=24)
    assert 20_000 - 128 < allocated(plan, max_new_tokens=24) <= 20_000
    assert allocated(plan, max_new_tokens=10) <= 20_000
    with pytest.raises(BudgetError) as refused:
        allocated(plan, max_new_tokens=40)
    assert str(refused.value) == (
        "the plan was solved for at most 20,000 bytes of KV cache, and 24,064 would be allocated: it was solved for "
        "max_new_tokens=24, not 40. Solve it again with kv_bytes=20000, batch_size=1, max_new_tokens=40, or allow it "
        "with over_limit=True"
    )
    assert allocated(plan, max_new_tokens=40, over_limit=True) == 24_064


def test_every_reason_is_named() -> None:
    plan = xkv_fx.solve(profiled("append"), kv_bytes=20_000)
    with pytest.raises(BudgetError, match=r"solved for batch_size=1, not 2, and for max_new_tokens=0, not 8. Solve it"):
        allocated(plan, rows=2, max_new_tokens=8)
    half = xkv_fx.solve(profiled("ring"), kv_bytes=10_000, dtype=torch.float16)
    with pytest.raises(BudgetError, match=r"for a smaller dtype than torch.float32.*dtype=torch.float32, or allow"):
        allocated(half)
    assert allocated(half, over_limit=True) > 10_000


def test_what_takes_less_is_not_refused() -> None:
    two_rows = xkv_fx.solve(profiled("ring"), kv_bytes=20_000, batch_size=2)
    assert allocated(two_rows) <= 10_000
    assert allocated(two_rows, max_new_tokens=64) <= 10_000  # a ring needs no room
    by_share = xkv_fx.solve(profiled("append"), fraction="50%")
    assert allocated(by_share, rows=2, max_new_tokens=64) == 2 * 128 * (200 + 2 * 64)  # no limit in bytes


def test_all_that_allocates_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ready_models.remember_captures(monkeypatch)
    model = ready_models.model()
    plan = xkv_fx.solve(profiled("append"), kv_bytes=20_000)
    llm = xkv_fx.transform(model, plan, backend="eager", check=False)
    for allocate in (
        lambda **more: xkv_fx.transform(model, plan, backend="eager", check=False, max_new_tokens=1, **more),
        lambda **more: llm.with_budgets(plan, max_new_tokens=1, **more),
        lambda **more: xkv_fx.Cache(model, plan, max_new_tokens=1, **more),
    ):
        with pytest.raises(BudgetError, match="solved for max_new_tokens=0, not 1"):
            allocate()
        assert allocate(over_limit=True).kv_bytes == 20_000 // 128 * 128 + 2 * 128


def test_plans_that_are_compared_keep_it_too() -> None:
    """Also where their slots are dearer, so that room takes more of the limit."""
    layers = ready_models.captured("llama", 2, 1).layers
    limit = xkv_fx.solve(profiled("append"), kv_bytes=20_000, max_new_tokens=24)
    coded = dataclasses.replace(limit, formats=(("int8", "int8"),) * 2, capacities=(200, 200))
    most = coded.kv_bytes(layers, max_new_tokens=24)
    assert most - 256 < uniform_like(coded, layers).kv_bytes(layers, max_new_tokens=24) <= most
    for plan in single_formats_like(coded, layers, 200).values():
        assert plan.kv_bytes(layers, max_new_tokens=24) <= most
    small = dataclasses.replace(coded, capacities=(1, 1))  # whose room alone takes more in the model's dtype
    assert uniform_like(small, layers).capacities == (1, 1)
    assert list(single_formats_like(small, layers, 200)) == [("int8", "int8"), ("int8", "int4"), ("int4", "int4")]


def test_a_file_with_a_limit_that_is_no_number_is_refused(tmp_path: Any) -> None:
    for name, value in (("kv_bytes", "many"), ("batch_size", 0), ("itemsize", 2.5), ("max_new_tokens", True)):
        with pytest.raises(BudgetError, match=f"the constraint's {name} must be a whole number of at least 1"):
            Provenance(constraint={name: value})
    plan = Budgets((8, 8)).to_dict()
    plan["provenance"]["constraint"] = {"kv_bytes": "many"}
    from xkv_fx.files import write_json

    write_json(tmp_path / "plan.json", plan)
    with pytest.raises(FileFormatError, match="the constraint's kv_bytes"):
        Budgets.load(tmp_path / "plan.json")
