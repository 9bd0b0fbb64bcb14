"""Files that version 0.1 wrote are read, and mean what they meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import ready_models
import torch
from tiny_models import random_ids

from xkv_fx import Budgets, Calibration, Policy, Profile
from xkv_fx.engines.manifest import Manifest
from xkv_fx.planning.data.load_measured import load_measured

FILES = Path(__file__).parent / "files_of_0_1"
MODEL = "LlamaForCausalLM:f5a96c0db65f36a6"


def test_a_plan() -> None:
    plan = Budgets.load(FILES / "budgets.json")
    assert (plan.capacities, plan.policy, plan.provenance.model) == ((20, 20), Policy(), MODEL)
    assert plan.provenance.expected_retention == pytest.approx(0.609234943985939)


@pytest.mark.parametrize(("name", "kind"), [("profile", Profile), ("calibration", Calibration)])
def test_what_was_measured(name: str, kind: type) -> None:
    measured = load_measured(FILES / f"{name}.safetensors")
    assert isinstance(measured, kind)
    assert (measured.model, len(measured.layers), measured.context_default) == (MODEL, 2, 40 if kind is Profile else 36)


@pytest.mark.parametrize("eviction", ["ring", "scored"])
def test_a_session(eviction: str) -> None:
    """It goes on as the conversation does that was never saved."""
    llm = ready_models.transformed(Budgets((12, 16), Policy(eviction=eviction)))  # type: ignore[arg-type]
    kept, read = llm.new_session(), llm.new_session()
    llm(random_ids(1, 21), past_key_values=kept)
    kept.step(random_ids(1, 1, seed=3), None)
    read.load(FILES / f"session_{eviction}.safetensors")
    assert read.get_seq_length() == 22
    following = random_ids(1, 1, seed=4)
    assert torch.allclose(read.step(following, None), kept.step(following, None), atol=1e-5)


def test_an_engines_manifest() -> None:
    manifest = Manifest.load(FILES)
    llm = ready_models.transformed(Budgets.load(FILES / "budgets.json"))
    assert manifest.program == llm.program.key
    assert manifest.plan == llm.program.plan
