"""Files that went wrong in any way are refused with a clear error, or are read as exactly what they say."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ready_models
import torch
from damage import damaged, rewritten_header, rewritten_json
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from sealed_json import sealed
from torch import Tensor

import xkv_fx
from xkv_fx import Budgets, Calibration, LayerSpec, Policy, Profile
from xkv_fx.budgets import Provenance
from xkv_fx.engines.form import KEY_FILE
from xkv_fx.engines.forms import PACKAGE_FORMS
from xkv_fx.engines.manifest import NAME, Manifest
from xkv_fx.errors import XkvError
from xkv_fx.fields import HEADER
from xkv_fx.files import SEAL
from xkv_fx.runtime.session import Session
from xkv_fx.runtime.session_file import load_session, save_session
from xkv_fx.runtime.slots import slot_plans
from xkv_fx.runtime.state import CachePlan

SPEC = LayerSpec(4, 2, 4, 4, 4)
PLAN = Budgets(
    (12, 16, 9),
    Policy(scorer_options={"kernel": 5, "observation_window": 4}, eviction="append", recent=3, sinks=1),
    Provenance(
        model="a model",
        allocator="xkv",
        constraint={"fraction": 0.25},
        context=64,
        source="0" * 64,
        expected_retention=0.75,
        held_out={"kl": [0.25, 0.5], "better": True},
    ),
)
seeds = st.integers(0, 2**63)


def read(path: Path, content: bytes, load: Callable[[Path], Any]) -> Any:
    """What is loaded from a file of this content; None where an error refuses it that names the file, or its folder."""
    path.write_bytes(content)
    try:
        return load(path)
    except XkvError as error:
        message = str(error)
        assert path.name in message or str(path.parent) in message
        assert len(message) < 1500
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


# Plans


FORMATS: Any = (("int8", "int4"), None, ("model", "fp8"))
STORED: dict[str, dict[str, Any]] = {
    "version 1": {},
    "version 2": {"formats": FORMATS},
    "version 3": {"formats": FORMATS, "mean_keys": (np.ones((2, 8)), None, None)},
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@given(seed=seeds)
@examples(80)
def test_a_plan(folder: Path, stored: dict[str, Any], seed: int) -> None:
    """A plan is text that people may edit, without a checksum: what is loaded is what the text says, field by field."""
    path, chance = folder / "plan.json", random.Random(seed)
    dataclasses.replace(PLAN, **stored).save(path)
    content = chance.choice((damaged, rewritten_json))(path.read_bytes(), chance)
    loaded = read(path, content, Budgets.load)
    if loaded is not None:
        said = json.loads(content)
        if "constants" not in said:  # a file of version 3 may have none, and then says nothing that is new in it
            said["version"] = min(said["version"], 1 if loaded.formats is None else 2)
        said["provenance"] = {**Provenance().to_dict(), **said.get("provenance", {})}
        assert json.dumps(loaded.to_dict("plan.json.safetensors"), sort_keys=True) == json.dumps(said, sort_keys=True)
        loaded.save(path)
        assert Budgets.load(path) == loaded


# What was measured


def make_profile() -> Profile:
    rng = np.random.default_rng(0)
    curves = []
    for length in (9, 12):
        curve = np.cumsum(np.concatenate((np.zeros((3, 1)), rng.random((3, length))), 1), 1)
        curves.append((curve / curve[:, -1:]).astype(np.float32))
    return Profile(tuple(curves), PLAN.policy, (SPEC,) * 3, "a model", {"preference": (0.5, 1.0, 2.0)})


def make_calibration() -> Calibration:
    kl = np.random.default_rng(0).random((2, 3, 2)).astype(np.float32)
    return Calibration(kl, (0.25, 0.5), (40, 50), 8, PLAN.policy, (SPEC,) * 3, "a model")


def make_calibration_of_formats() -> Calibration:
    kl = np.random.default_rng(0).random((2, 3, 3)).astype(np.float32)
    layers, pairs = (dataclasses.replace(SPEC, key_dim=8, value_dim=8),) * 3, (("int8", "int4"),) * 3
    return Calibration(kl, (0.25, 0.5, 1.0), (40, 50), 8, PLAN.policy, layers, "a model", pairs)


@pytest.mark.parametrize("make", [make_profile, make_calibration, make_calibration_of_formats])
@given(seed=seeds)
@examples(40)
def test_measurements(folder: Path, make: Callable[[], Profile | Calibration], seed: int) -> None:
    """Their checksum lets nothing through but what was saved."""
    measured = make()
    path, chance = folder / "measured.safetensors", random.Random(seed)
    measured.save(path)
    whole = path.read_bytes()
    content = rewritten_header(whole, chance, HEADER) if chance.random() < 0.5 else damaged(whole, chance)
    loaded = read(path, content, type(measured).load)
    assert loaded is None or loaded == measured


# Sessions


@dataclasses.dataclass(frozen=True)
class NoGraphs:
    """What a session's file needs of a program."""

    plan: CachePlan
    key: str = "1" * 64
    max_positions: int | None = None
    known_tokens: int = 64

    def prefill(self, all_logits: bool) -> Any: ...
    def extend(self, all_logits: bool) -> Any: ...
    def decode(self) -> Any: ...


def make_session() -> Session:
    """Of two layers, of which one has seen less than it holds."""
    budgets = Budgets((3, 8), Policy(eviction="scored"))
    plan = CachePlan((SPEC,) * 2, slot_plans(budgets, (SPEC,) * 2), 1, torch.float32, torch.device("cpu"))
    session = Session(NoGraphs(plan))
    for name, tensor in zip(plan.names(), session.state.tensors, strict=True):
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    session.state["positions_0"].copy_(torch.tensor([4, 1, 3]))
    session.state["seen"].fill_(5)
    session.state["base"].fill_(4)
    session.restore(session.state, fed=5)
    return session


@given(seed=seeds)
@examples(40)
def test_a_session(folder: Path, seed: int) -> None:
    """Nothing but the whole session is taken, and a refused one leaves the session as it was."""
    session, other = make_session(), Session(make_session().program)
    path, chance = folder / "session.safetensors", random.Random(seed)
    save_session(session, path)
    whole = path.read_bytes()
    content = rewritten_header(whole, chance, "xkv_fx") if chance.random() < 0.5 else damaged(whole, chance)
    untouched = [tensor.clone() for tensor in other.state.tensors]

    def loaded(path: Path) -> int:
        load_session(other, path)
        return other.history.fed

    fed = read(path, content, loaded)
    assert fed in (None, 5)
    expected = untouched if fed is None else session.state.tensors
    assert all(map(torch.equal, other.state.tensors, expected))
    assert other.seen == ((0,) if fed is None else (5,))


# Engines


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine's folder in which all is as `export` writes it, but for the graphs, which are none."""
    llm = ready_models.transformed(Budgets((12, 16)))
    weights: dict[str, Tensor] = {"weight": torch.arange(24.0).view(4, 6)}

    def without_graph(program: Any, path: Path, key: str, plan: Any) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"program/extra/{KEY_FILE}", key)
            archive.writestr("program/models/model.json", "{}")

    path = tmp_path_factory.mktemp("engines") / "engine"
    with pytest.MonkeyPatch.context() as patch:
        form = PACKAGE_FORMS["program"]
        form = dataclasses.replace(form, trace=lambda *args: (None, weights), write=without_graph)
        patch.setitem(PACKAGE_FORMS, "program", form)  # type: ignore[arg-type]
        xkv_fx.export(llm, path, target="pt2")
    return path


def resealed(content: bytes, chance: random.Random) -> bytes:
    """The manifest rewritten, mostly with the checksum that goes with it."""
    data = json.loads(rewritten_json(content, chance))
    try:
        return json.dumps(sealed(data) if chance.random() < 0.9 else data).encode()
    except ValueError:  # NaN has no checksum
        return json.dumps(data).encode()


def json_or_bytes(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content


def says_as_much(saved: Any, read: Any) -> bool:
    """Whether what was saved again is what was read, but for what may be left out, and was, being null."""
    if isinstance(saved, dict) and isinstance(read, dict):
        return read.keys() <= saved.keys() and all(says_as_much(saved[name], read.get(name)) for name in saved)
    return bool(saved == read)


@given(seed=seeds)
@examples(60)
def test_an_engine(exported: Path, folder: Path, seed: int) -> None:
    """Files have checksums, the manifest too. One that was rewritten by somebody who knows of its checksum is taken for
    what it says: whatever the graphs depend on is in them too, and what remains must be what an engine can have."""
    chance = random.Random(seed)
    twin = folder / "engine"
    shutil.rmtree(twin, ignore_errors=True)
    shutil.copytree(exported, twin)
    name = chance.choice((NAME, NAME, NAME, *sorted(path.name for path in exported.iterdir())))
    path = twin / name
    whole = path.read_bytes()
    knowing = name == NAME and chance.random() < 0.6
    content = resealed(whole, chance) if knowing else damaged(whole, chance)
    with pytest.MonkeyPatch.context() as patch:
        form = dataclasses.replace(PACKAGE_FORMS["program"], load=lambda *args: lambda inputs: torch.zeros(1))
        patch.setitem(PACKAGE_FORMS, "program", form)  # type: ignore[arg-type]
        loaded = read(path, content, lambda _: xkv_fx.load(twin, trust=True))
    if loaded is not None:
        assert knowing or json_or_bytes(content) == json_or_bytes(whole)
        loaded.manifest.save(folder)
        saved, given = (json.loads(path.read_bytes()) for path in (folder / NAME, twin / NAME))
        assert says_as_much({**saved, SEAL: None}, {**given, SEAL: None})
        assert Manifest.load(folder) == loaded.manifest  # its checksum included
        assert loaded.new_session().state.kv_bytes == loaded.kv_bytes == Manifest.load(exported).plan.kv_bytes
        assert all(token >= 0 for token in loaded.manifest.end_tokens)
