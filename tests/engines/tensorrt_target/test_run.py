"""The target "tensorrt" around TensorRT itself, which a stand-in takes the place of; `make test-tensorrt` has the real
one, but runs nothing either."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ready_models
import torch
from exhaustive import exhaustive
from sealed_json import sealed
from tiny_models import random_ids
from torch import Tensor

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.engines.folder import inspect_engine
from xkv_fx.engines.forms import PACKAGE_FORMS
from xkv_fx.engines.manifest import Manifest, inputs_of
from xkv_fx.engines.records import TensorRTBuild
from xkv_fx.engines.targets import TARGETS
from xkv_fx.engines.tensorrt import build as tensorrt
from xkv_fx.engines.tensorrt.graph import trace_for_tensorrt

BUILD = TensorRTBuild("tensorrt_rtx", "1.6", "2.14", layers=313, caches_in_place=4, native_attentions=2)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=exhaustive)], ids=["in place", "by the caller"])
def llm(request: pytest.FixtureRequest) -> Any:
    policy = Policy() if request.param == 1 else Policy(eviction="scored", sinks=1)
    return ready_models.transformed(Budgets((12, 16), policy), rows=request.param)


@pytest.mark.skipif(importlib.util.find_spec("torch_tensorrt") is not None, reason="Torch-TensorRT is installed")
def test_without_torch_tensorrt_it_is_said_what_to_install(llm: Any, tmp_path: Path) -> None:
    with pytest.raises(xkv_fx.EngineError, match="install torch-tensorrt-rtx"):
        xkv_fx.export(llm, tmp_path / "engine", target="tensorrt")
    assert not list(tmp_path.iterdir())


def with_tools(patch: pytest.MonkeyPatch) -> None:
    """As if Torch-TensorRT were installed."""
    form = dataclasses.replace(PACKAGE_FORMS["tensorrt"], check_tools=lambda: None)
    patch.setitem(PACKAGE_FORMS, "tensorrt", form)  # type: ignore[arg-type]


def test_the_model_must_be_on_a_gpu(llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_tools(monkeypatch)
    with pytest.raises(xkv_fx.BackendError, match="'tensorrt' run on cuda; this model is on cpu"):
        xkv_fx.export(llm, tmp_path / "engine", target="tensorrt")


@pytest.fixture(scope="module")
def stand_in(llm: Any) -> types.ModuleType:
    """Runs the traced graph at the addresses that it is given, as an engine would."""
    program = trace_for_tensorrt(llm.decode, llm.program.plan)
    decode = program.module()
    inputs = {spec.name: spec for spec in inputs_of("decode", llm.program.plan)}
    plan = llm.program.plan
    caches = tensorrt.caches_of(plan) if tensorrt.written_in_place(plan) else ()
    returned = {
        f"output{index}": name
        for index, name in enumerate(("logits", *(part.name for part in tensorrt.returned_by(plan))))
    }
    aliases = {f"updated_{name}": name for name in caches}
    outputs = [*returned, *aliases]

    class Context:
        def __init__(self) -> None:
            self.addresses: dict[str, int] = {}

        def set_tensor_address(self, name: str, address: int) -> None:
            assert name in inputs or name in outputs
            self.addresses[name] = address

        def execute_async_v3(self, stream: int) -> bool:
            given = [at(self.addresses[name], spec.shape, getattr(torch, spec.dtype)) for name, spec in inputs.items()]
            assert all(self.addresses[output] == self.addresses[cache] for output, cache in aliases.items())
            found = decode(*given)
            for output, tensor in zip(returned, found if isinstance(found, tuple) else (found,), strict=True):
                at(self.addresses[output], tensor.shape, tensor.dtype).copy_(tensor)
            return True

    class Engine:
        num_io_tensors = len(inputs) + len(outputs)

        def get_tensor_name(self, index: int) -> str:
            return [*inputs, *outputs][index]

        def get_tensor_mode(self, name: str) -> str:
            return "in" if name in inputs else "out"

        def get_tensor_dtype(self, name: str) -> str:
            return "float32"

        def get_aliased_input_tensor(self, name: str) -> str | None:
            return aliases.get(name)

        def create_execution_context(self) -> Context:
            return Context()

    class Runtime:
        def __init__(self, logger: object) -> None:
            pass

        def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
            return Engine() if content == b"an engine" else None

    module = types.ModuleType("tensorrt_rtx")
    module.__dict__.update(
        __version__=BUILD.version, Runtime=Runtime, Logger=lambda level: None, float32="float32", float16="float16",
        bfloat16="bfloat16", TensorIOMode=types.SimpleNamespace(INPUT="in", OUTPUT="out"),
    )  # fmt: skip
    module.Logger.WARNING = 1  # type: ignore[attr-defined]
    return module


def at(address: int, shape: Any, dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel()
    memory = (ctypes.c_byte * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@pytest.fixture(scope="module")
def without_a_gpu(llm: Any) -> Iterator[None]:
    """The target takes the CPU, its prompts the form that needs no compiler, and TensorRT builds nothing."""
    with pytest.MonkeyPatch.context() as patch:
        target = dataclasses.replace(TARGETS["tensorrt"], prompts="program", devices=("cpu",))
        patch.setitem(TARGETS, "tensorrt", target)  # type: ignore[arg-type]
        with_tools(patch)
        patch.setattr("xkv_fx.engines.tensorrt.build.build_engine", lambda *_: (memoryview(b"an engine"), BUILD))
        patch.setattr("torch.cuda.current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
        yield


@pytest.fixture(scope="module")
def folder(llm: Any, without_a_gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "llama"
    xkv_fx.export(llm, path, target="tensorrt")
    return path


def test_an_engine_decodes_as_the_transformed_model_does(
    llm: Any, folder: Path, stand_in: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(xkv_fx.EngineError, match=r"not installed here; install tensorrt-rtx==1\.6"):
        xkv_fx.load(folder, trust=True)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", stand_in)
    engine = xkv_fx.load(folder, trust=True)
    rows = llm.program.plan.rows
    ids = random_ids(rows, 9)
    expected = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert torch.equal(engine.generate(ids, 10), expected)
    first, second = engine.new_session(), engine.new_session()
    for session in (first, second):
        session.feed(ids)
        session.step(ids[:, :1])
    assert torch.equal(first.state["k_1"], second.state["k_1"])
    assert first.seen == second.seen == (10,) * rows
    assert first.state["seen"].tolist() == [10] * rows


def test_the_manifest_says_what_was_built(folder: Path) -> None:
    assert Manifest.load(folder).tensorrt == BUILD
    found = inspect_engine(folder)
    assert found["tensorrt"] == {**dataclasses.asdict(BUILD), "left_to_torch": 0}
    assert found["checks"] == {"machine": "ok", "files": "ok", "packages": "ok"}


def refused(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    path = folder / "manifest.json"
    before = path.read_text()
    data = json.loads(before)
    change(data)
    path.write_text(json.dumps(sealed(data)))
    with pytest.raises((xkv_fx.EngineError, xkv_fx.FileFormatError), match=message):
        xkv_fx.load(folder, trust=True)
    path.write_text(before)


def test_a_wrong_manifest_is_refused(folder: Path, stand_in: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", stand_in)
    refused(folder, lambda data: data["tensorrt"].update(library="os"), "library 'os' is unknown")
    refused(folder, lambda data: data["tensorrt"].update(version="1.7"), r"built by tensorrt_rtx 1\.7")
    refused(folder, lambda data: data["tensorrt"].update(layers="many"), "wrong type")
    refused(folder, lambda data: data["tensorrt"].pop("layers"), "lacks 'layers'")
    refused(folder, lambda data: data.update(tensorrt=None), "belongs to that target only")
    refused(folder, lambda data: data.update(target="pt2"), "belongs to that target only")
    refused(folder, lambda data: data.update(known_tokens=3), "other budgets, weights or shapes")
