"""The table of backends: every file is a row, names come from there, and a row is all that a backend needs."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import ready_models
import torch
from tiny_models import random_ids
from torch.fx import GraphModule
from typer.testing import CliRunner

import xkv_fx
from xkv_fx import Budgets, cli
from xkv_fx.errors import BackendError
from xkv_fx.lowering.backends import table
from xkv_fx.lowering.backends.backend import Backend, Lowered

FOLDER = Path(table.__file__).parent


def test_every_file_is_a_row() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "backend", "table"}
    assert files == {home.rpartition(".")[2] for home in table._HOMES.values()}
    for name in table.BACKENDS:
        assert isinstance(table.backend_of(name), Backend)


@pytest.mark.parametrize("name", ["exe", "", None, ["eager"]])
def test_an_unknown_name_is_refused(name: Any) -> None:
    with pytest.raises(BackendError, match=r"unknown backend .*; choose one of inductor, eager"):
        table.backend_of(name)
    with pytest.raises(BackendError, match="choose one of inductor, eager"):
        xkv_fx.transform(ready_models.model(), Budgets((12, 16)), backend=name)


@pytest.mark.parametrize("command", ["generate", "eval", "bench"])
def test_commands_name_them_all(command: str) -> None:
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    assert "inductor or eager" in " ".join(shown.split())


def test_a_new_backend_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy, which counts the calls of the decode graph."""
    runs: list[int] = []

    def lower(module: GraphModule) -> Lowered:
        def run(*inputs: torch.Tensor) -> torch.Tensor:
            runs.append(len(inputs))
            with torch.no_grad():
                logits: torch.Tensor = module(*inputs)
            return logits

        return Lowered(run)

    home = types.ModuleType("toy_backend")
    home.BACKEND = Backend(lower, lambda lowered: f"counted: {len(runs)}")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_backend", home)
    monkeypatch.setitem(table._HOMES, "toy", "toy_backend")
    assert importlib.import_module("toy_backend") is home
    monkeypatch.setattr(table, "BACKENDS", tuple(table._HOMES))
    ready_models.remember_captures(monkeypatch)
    llm = xkv_fx.transform(ready_models.model(), Budgets((12, 16)), backend="toy", check=False)
    ids = random_ids(1, 9)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    expected = ready_models.transformed(Budgets((12, 16))).generate(ids, **options)
    assert torch.equal(llm.generate(ids, **options), expected)
    assert len(runs) == 3
    assert "decode        counted: 3" in llm.describe()
