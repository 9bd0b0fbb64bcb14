"""The tables of targets and of package forms: what one row says is all that export, load and the checks go by."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import ready_models
import torch
from sealed_json import sealed
from tiny_models import random_ids
from torch import Tensor
from typer.testing import CliRunner

import xkv_fx
from xkv_fx import Budgets, cli
from xkv_fx.engines import aoti, pt2
from xkv_fx.engines.folder import inspect_engine
from xkv_fx.engines.form import PackageForm
from xkv_fx.engines.forms import PACKAGE_FORMS, forms_of
from xkv_fx.engines.targets import TARGETS, Target
from xkv_fx.errors import EngineError, FileFormatError

MAGIC = "toy"


@pytest.fixture(scope="module")
def llm() -> Any:
    return ready_models.transformed(Budgets((12, 16)))


def test_every_target_names_forms_that_there_are() -> None:
    for target in TARGETS.values():
        assert set(forms_of(target)) == {"prefill", "extend", "decode"}
    assert {form for target in TARGETS.values() for form in (target.prompts, target.decode)} == set(PACKAGE_FORMS)


def test_the_command_names_them_all() -> None:
    shown = CliRunner().invoke(cli.app, ["export", "--help"], env={"COLUMNS": "200"}).stdout
    assert "aoti: compiled for this machine; pt2: portable, with pickle; tensorrt: on a GPU, decode by TensorRT." in (
        " ".join(shown.replace("│", " ").split())
    )


def test_a_new_target_is_a_row_and_a_new_form_another(
    llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A toy, whose packages say which graph they are, and are run by a copy that never left the process."""
    kept: dict[str, Any] = {}

    def write(program: Any, path: Path, key: str, plan: Any) -> None:
        kept[path.name] = program.module(check_guards=False)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{path.stem}/{MAGIC}", key)

    def load(path: Path, manifest: Any) -> Any:
        def run(inputs: list[Tensor]) -> Tensor:
            logits: Tensor = kept[path.name](*inputs)
            return logits

        return run

    toy = PackageForm(
        suffix=".toy",
        trace=pt2.FORM.trace,
        write=write,
        load=load,
        belongs=lambda member: member == MAGIC,
        holds_key=lambda member: member == MAGIC,
    )
    monkeypatch.setitem(PACKAGE_FORMS, "toy", toy)  # type: ignore[arg-type]
    monkeypatch.setitem(TARGETS, "toys", Target("toy", "toy", ("cpu",), "a toy"))  # type: ignore[arg-type]
    xkv_fx.export(llm, tmp_path / "engine", target="toys")
    assert (tmp_path / "engine" / "decode.toy").is_file()
    engine = xkv_fx.load(tmp_path / "engine")
    ids = random_ids(1, 9)
    expected = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert torch.equal(engine.generate(ids, 8), expected)
    assert inspect_engine(tmp_path / "engine")["checks"]["packages"] == "ok"

    monkeypatch.setitem(PACKAGE_FORMS, "toy", dataclasses.replace(toy, pickled=True))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="reads the target 'toys' with pickle"):
        xkv_fx.load(tmp_path / "engine")


@pytest.fixture(scope="module")
def folder(llm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "llama"
    xkv_fx.export(llm, path, target="pt2")
    return path


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[]", '{"xkv_fx": 1}', "{}"])
def test_compiled_code_whose_metadata_is_damaged_is_refused(folder: Path, tmp_path: Path, content: str) -> None:
    """Somebody who knows of the manifest's checksums has written it."""
    twin = Path(shutil.copytree(folder, tmp_path / "twin"))
    data = json.loads((twin / "manifest.json").read_text())
    data["target"] = "aoti"
    for kind in ("prefill", "extend", "decode"):
        with zipfile.ZipFile(twin / f"{kind}.pt2", "w") as archive:
            archive.writestr(f"{kind}/data/aotinductor/model/a_metadata.json", content)
        written = (twin / f"{kind}.pt2").read_bytes()
        data["files"][f"{kind}.pt2"] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    (twin / "manifest.json").write_text(json.dumps(sealed(data)))
    with pytest.raises((EngineError, FileFormatError), match=r"prefill.pt2"):
        xkv_fx.load(twin)


def test_members_of_a_package_of_compiled_code() -> None:
    names = ["version", "data/aotinductor/model/x.so", "models/model.json", "data/weights/pickle.pkl"]
    assert [aoti.FORM.belongs(name) for name in names] == [False, True, False, False]
    assert [aoti.FORM.holds_key(f"data/aotinductor/model/{name}") for name in ("x_metadata.json", "x.json")] == [
        True,
        False,
    ]
