"""The options that say which model a command is about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ready_models import model, remember_captures
from typer.testing import CliRunner

import xkv_fx
from xkv_fx import cli
from xkv_fx.cli import model_options
from xkv_fx.cli.model_options import ModelOptions, steps
from xkv_fx.errors import BackendError, UnsupportedModelError
from xkv_fx.hf import models

RUN = CliRunner()
COMMANDS = ("fit", "profile", "calibrate", "solve", "verify", "generate", "eval", "bench", "export")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_a_model_has_them(command: str) -> None:
    shown = RUN.invoke(cli.app, [command, "--help"], env={"COLUMNS": "300"}).output
    for option in ("--model", "--dtype", "--device", "--threads", "--trust-remote-code", "--revision"):
        assert option in shown


def test_what_was_said_is_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(models, "load_model", lambda name, **options: given.update(options, name=name))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: given.update(threads=count))
    ModelOptions().load()
    assert given == {"name": "smollm2"}, "defaults are load_model's own"
    ModelOptions("a/b", "bfloat16", threads=3, trust_remote_code=True, revision="v1").load()
    assert given == {
        "name": "a/b", "dtype": torch.bfloat16, "threads": 3, "trust_remote_code": True, "revision": "v1"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ModelOptions(dtype="int8"), "unknown dtype 'int8'; choose one of float32"),
        (ModelOptions(device="tpu"), "unknown device 'tpu'"),
        (ModelOptions(device="cpu:0"), "unknown device 'cpu:0'"),
        (ModelOptions(device="cuda:x"), "unknown device 'cuda:x'"),
        (ModelOptions(device="cuda"), "this torch sees no CUDA device"),
    ],
    ids=str,
)
def test_dtypes_and_devices_that_there_are_not(
    options: ModelOptions, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=message):
        options.load()


def test_one_of_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert models.device_named("cuda:1") == torch.device("cuda:1")
    with pytest.raises(BackendError, match="there is no device cuda:2; this torch sees 2"):
        models.device_named("cuda:2")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("owner/name", True),
        ("o.w-n_er/na.me-1", True),
        ("name", False),
        ("a/b/c", False),
        ("../a", False),
        ("a/..", False),
    ],
)
def test_names_on_the_hub(name: str, is_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert models.is_hub_name(name) == is_one
    if is_one:
        (tmp_path / name).mkdir(parents=True)
        assert not models.is_hub_name(name), "a folder comes first"


def test_a_model_on_the_hub_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    class Loaded:
        def to(self, device: torch.device) -> None:
            asked.append(("to", device))

        def eval(self) -> Loaded:
            return self

    def from_pretrained(source: Any, **options: Any) -> Loaded:
        asked.append((source, options))
        return Loaded()

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", from_pretrained)
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    models.load_model("owner/name", revision="abc")
    assert asked[0] == ("owner/name", {"trust_remote_code": False, "revision": "abc"})
    assert asked[1] == ("owner/name", {"trust_remote_code": False, "revision": "abc", "dtype": torch.float32})
    with pytest.raises(UnsupportedModelError, match="'smollm2' is not one; leave it out"):
        models.load_model("smollm2", revision="abc")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError("it is not there\nlong advice"),
            "no folder owner/name here, and the model of that name on the Hub could not be loaded: it is not",
        ),
        (
            ValueError("please pass the argument `trust_remote_code=True`"),
            "only with --trust-remote-code; read it first",
        ),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UnsupportedModelError, match=message):
        models.load_model("owner/name")


def test_transform_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_captures(monkeypatch)
    said: list[str] = []
    xkv_fx.transform(model(), xkv_fx.Budgets((8, 8)), 2, backend="eager", progress=said.append)
    assert said == ["capturing the model", "building the graphs"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(model_options, "perf_counter", lambda: now[0])
    return now


def test_steps_that_took_a_while_are_lines_where_there_is_no_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with steps() as step:
        for what, seconds in (("loading", 2.5), ("checking", 0.1), ("compiling", 31.0)):
            step(what)
            clock[0] += seconds
    assert capsys.readouterr().err.splitlines() == ["loading: 2.5 s", "compiling: 31.0 s"]
    with steps(shown=False) as step:
        step("loading")
        clock[0] += 9
    assert capsys.readouterr().err == ""


def test_a_spinner_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    monkeypatch.setattr(model_options, "errors", Console(stderr=True, force_terminal=True))
    with steps() as step:
        step("loading")
        step("compiling")
    assert "compiling" in capsys.readouterr().err


def test_export_by_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    remember_captures(monkeypatch)
    loaded: list[str] = []

    class Tokenizer:
        def save_pretrained(self, folder: str) -> None: ...

    def load_model(name: str, **options: Any) -> tuple[Any, Any]:
        loaded.append(name)
        return model(), Tokenizer()

    monkeypatch.setattr(models, "load_model", load_model)
    xkv_fx.Budgets((8, 8)).save(tmp_path / "plan.json")
    options = ["export", str(tmp_path / "plan.json"), "--out", str(tmp_path / "engine"), "--target", "pt2", "--json"]
    result = RUN.invoke(cli.app, [*options, "--model", "mine"])
    assert result.exit_code == 0, result.output
    assert loaded == ["mine"]
    assert json.loads(result.stdout)["capacities"] == [8, 8]
