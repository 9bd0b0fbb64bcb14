"""The users' class of plans: whatever hands them one hands out this class, and equals the ground's."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import ready_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_ids

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.budgets import Plan, Provenance
from xkv_fx.engines.manifest import Manifest
from xkv_fx.planning.solve import plan as solving
from xkv_fx.public_budgets import budgets_of

FILES = Path(__file__).parent / "files_of_0_1"
PROMPTS = [random_ids(1, 24, seed=seed)[0] for seed in range(2)]


def is_public(budgets: Any) -> bool:
    return type(budgets) is Budgets


def test_every_way_to_make_one(tmp_path: Path) -> None:
    plan = Budgets((4, 8))
    plan.save(tmp_path / "plan.json")
    made = (
        plan, Budgets.uniform(2, 4), Budgets.full(2, 4), Budgets.load(tmp_path / "plan.json"),
        Budgets.from_dict(plan.to_dict()), dataclasses.replace(plan, capacities=(1, 2)),
        pickle.loads(pickle.dumps(plan)),
    )  # fmt: skip
    assert all(map(is_public, made))
    assert repr(plan).startswith("Budgets(capacities=(4, 8), policy=Policy(")


def test_what_is_solved_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ready_models.capture_once(monkeypatch)
    model = ready_models.model()
    solved = xkv_fx.solve(xkv_fx.Profile.load(FILES / "profile.safetensors"), fraction=0.5, multiple=4)
    assert is_public(solved)
    report = xkv_fx.verify(model, solved, PROMPTS, continuation=4)
    assert is_public(report.stored_in(solved))
    assert is_public(report.uniform_plan(solved))
    calibration = xkv_fx.Calibration.load(FILES / "calibration.safetensors")
    assert is_public(xkv_fx.fit_quality(model, calibration, PROMPTS, kl=100.0, continuation=4, resolution=0.5))
    assert (
        xkv_fx.verify(model, Plan(solved.capacities, solved.policy, solved.provenance), PROMPTS, continuation=4)
        == report
    )


def test_what_models_and_engines_hold() -> None:
    plan = Budgets((12, 16))
    assert ready_models.transformed(plan).with_budgets(plan).budgets is plan
    assert is_public(Manifest.load(FILES, Budgets).budgets)
    assert is_public(xkv_fx.Cache(ready_models.model(), FILES / "budgets.json").budgets)
    assert is_public(xkv_fx.Cache(ready_models.model(), Plan((12, 16))).budgets)
    assert xkv_fx.Cache(ready_models.model(), plan).budgets is plan


def test_a_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer = torch.nn.Linear(2, 2), xkv_fx.LayerSpec(8, 2, 16, 16, 4)
    monkeypatch.setattr("xkv_fx.hf.capture.layers_of_model", lambda given: (layer,) * 2 if given is model else ())
    assert Budgets((1, 2)).kv_bytes(model) == 3 * 256
    assert Budgets((1, 2)).kv_bytes(model, 2, torch.float16, 5) == 2 * 3 * 128
    append = Budgets((1, 2), Policy(eviction="append"))
    assert append.kv_bytes(model, batch_size=2, dtype=torch.float16, max_new_tokens=5) == 2 * 13 * 128


plans = st.builds(
    Plan,
    st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
    st.sampled_from([Policy(), Policy(sinks=1)]),
    st.sampled_from([Provenance(), Provenance(constraint={"fraction": 0.5})]),
)


@given(plans, plans)
def test_plans_are_equal_by_what_they_say(one: Plan, other: Plan) -> None:
    public = budgets_of(one)
    assert is_public(public)
    assert public == one
    assert one == public
    assert hash(public) == hash(one)
    assert (public == other) == (one == other) == (one.to_dict() == other.to_dict())
    assert (public != other) == (one != other)
    assert len({public, one, other}) == (1 if one == other else 2)
    assert one != one.capacities


def test_it_is_frozen() -> None:
    for name in ("capacities", "anything"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(Budgets((4,)), name, (5,))


def test_solve_takes_what_the_solver_takes() -> None:
    ours, its = (inspect.signature(call).parameters.values() for call in (xkv_fx.solve, solving.solve_plan))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in its]
