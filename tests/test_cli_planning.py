"""The commands that measure and plan, run in process on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ready_models import captured, model, remember_captures
from typer.testing import CliRunner

import xkv_fx
from xkv_fx import cli
from xkv_fx.errors import BudgetError
from xkv_fx.formats import pair_name
from xkv_fx.runtime.slots import slot_plans

RUN = CliRunner()
MEASURE = ["--length", "30", "--continuation", "6"]


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 50 for letter in text]}


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_captures(monkeypatch)
    monkeypatch.setattr("xkv_fx.hf.models.load_model", lambda name: (model(), Letters()))


def invoke(*arguments: Any) -> str:
    result = RUN.invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(
        "How vainly men themselves amaze to win the palm, the oak, or bays; and their uncessant labours see."
    )
    return path


@pytest.fixture
def calibrated(tmp_path: Path, text: Path) -> Path:
    path = tmp_path / "calibration.safetensors"
    invoke("calibrate", "--out", path, "--prompts", text, "--eviction", "append", *MEASURE)
    return path


def test_calibrate_solve_verify(calibrated: Path, text: Path, tmp_path: Path) -> None:
    assert not Path(f"{calibrated}.parts").exists(), "what was written aside is gone"
    calibration = xkv_fx.Calibration.load(calibrated)
    assert calibration.lengths == (30, 30)
    assert calibration.policy.eviction == "append"

    plan = tmp_path / "plan.json"
    shown = json.loads(invoke("solve", calibrated, "--out", plan, "--fraction", "0.4", "--multiple", "1", "--json"))
    assert shown["provenance"]["allocator"] == "calibrated"
    assert xkv_fx.Budgets.load(plan) == xkv_fx.solve(calibration, fraction=0.4, multiple=1)

    checked = tmp_path / "checked.json"
    report = json.loads(invoke("verify", plan, "--prompts", text, "--out", checked, *MEASURE, "--json"))
    held_out = xkv_fx.Budgets.load(checked).provenance.held_out
    assert held_out is not None
    assert report == {"better": report["better"], **held_out}


def test_a_plan_that_is_not_better_is_warned_of_and_replaced_if_asked(
    calibrated: Path, text: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    options = ["--total-tokens", "20", "--multiple", "1", "--allocator", "pyramid", "--holdout", text, *MEASURE]
    result = RUN.invoke(cli.app, [str(part) for part in ("solve", calibrated, "--out", plan, *options)])
    assert result.exit_code == 0
    assert "warning: the plan is not better than all layers in int" in result.stderr
    kept = xkv_fx.Budgets.load(plan)
    assert kept.provenance.allocator == "pyramid"
    assert kept.provenance.held_out is not None

    invoke("solve", calibrated, "--out", plan, *options, "--fall-back")
    fallen = xkv_fx.Budgets.load(plan)
    assert len(set(fallen.capacities)) == 1
    assert fallen.formats is not None
    assert len(set(fallen.formats)) == 1
    assert f"all layers in {pair_name(fallen.formats[0])}, {fallen.capacities[0]} tokens each" in result.stderr


def test_formats_on_the_command_line(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plan = tmp_path / "calibration.safetensors", tmp_path / "plan.json"
    options = ["--formats", "model, int8,int4", "--eviction", "append", "--grid", "0.2", "--grid", "0.6", *MEASURE]
    shown = json.loads(invoke("calibrate", "--out", path, "--prompts", text, *options, "--json"))
    assert (shown["formats"], shown["grid"]) == (["model", "int8", "int8/int4", "int4"], [0.2, 0.6, 1.0])
    calibration = xkv_fx.Calibration.load(path)
    assert calibration.pairs == (None, ("int8", "int8"), ("int8", "int4"), ("int4", "int4"))

    solving = ["solve", path, "--out", plan, "--fraction", "0.2", "--holdout", text, *MEASURE]
    shown = json.loads(invoke(*solving, "--json"))
    solved = xkv_fx.solve(calibration, fraction=0.2)
    assert [pair and tuple(pair) for pair in shown["formats"]] == list(solved.layer_formats)
    kept = xkv_fx.Budgets.load(plan)
    assert (kept.capacities, kept.formats) == (solved.capacities, solved.formats)
    assert calibration.mean_keys is not None
    assert kept.mean_keys == solved.mean_keys == calibration.mean_keys
    assert kept.provenance.held_out is not None
    assert set(kept.provenance.held_out) >= {"single_format", "single_format_ratio", "best"}
    table = invoke(*solving)
    assert "formats" in table
    assert "of 2 of 2 layers, taken off keys in fewer bits" in table
    assert all(pair_name(pair) in table for pair in solved.layer_formats)


def test_falling_back_needs_something_to_judge_by(calibrated: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="needs --holdout"):
        invoke("solve", calibrated, "--out", tmp_path / "plan.json", "--fraction", "0.4", "--fall-back")


def test_an_interrupted_calibration_says_where_it_goes_on(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "calibration.safetensors"
    measure = xkv_fx.calibrate

    def interrupted(loaded: Any, rows: Any, **options: Any) -> Any:
        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        return measure(loaded, rows, **{**options, "progress": stop})

    monkeypatch.setattr(xkv_fx, "calibrate", interrupted)
    arguments = ["calibrate", "--out", str(out), "--prompts", str(text), *MEASURE]
    result = RUN.invoke(cli.app, arguments)
    assert result.exit_code == 130
    assert "goes on from there" in result.stderr.replace("\n", " ")
    assert len(list(Path(f"{out}.parts").iterdir())) == 1
    assert not out.exists()
    monkeypatch.setattr(xkv_fx, "calibrate", measure)
    invoke(*arguments)
    assert out.exists()


def test_profile_measures_statistics_on_demand(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "profile.safetensors"
    invoke("profile", "--out", out, "--prompts", text, "--length", "30", "--statistics", "preference")
    assert set(xkv_fx.Profile.load(out).layer_means) == {"preference"}
    invoke("solve", out, "--out", tmp_path / "plan.json", "--fraction", "0.5", "--allocator", "entropy")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((name, "--out") for name in ("profile", "calibrate", "solve", "verify", "eval", "bench")),
        ("bench", "--picture"),
    ],
)
def test_a_file_that_could_not_be_written_is_refused_before_anything_is_measured(
    command: str, option: str, text: Path, tmp_path: Path
) -> None:
    needed = {
        "profile": ["--prompts", text],
        "calibrate": ["--prompts", text],
        "solve": [text],
        "verify": [text, "--prompts", text],
    }
    for place, said in ((tmp_path, "is a folder"), (tmp_path / "missing" / "result", "there is no folder")):
        arguments = [command, *needed.get(command, ()), option, place]
        result = RUN.invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})
        assert result.exit_code == 2
        assert said in result.output


def test_sizes_in_words_and_room(calibrated: Path, tmp_path: Path) -> None:
    plan, layers = tmp_path / "plan.json", xkv_fx.Calibration.load(calibrated).layers
    for size, limit in (("6kB", 6000), ("5.5 KiB", 5632), ("6000", 6000)):
        invoke("solve", calibrated, "--out", plan, "--kv-bytes", size, "--max-new-tokens", 8, "--multiple", 1)
        budgets = xkv_fx.Budgets.load(plan)
        assert budgets.provenance.constraint == {"kv_bytes": limit, "max_new_tokens": 8}
        assert limit - 128 < budgets.kv_bytes(layers, max_new_tokens=8) <= limit
    invoke("solve", calibrated, "--out", plan, "--fraction", "40%", "--multiple", 1)
    assert xkv_fx.Budgets.load(plan).provenance.constraint == {"fraction": 0.4}
    for option, word, message in (
        ("--fraction", "38.4", "did you mean 0.384"),
        ("--fraction", "2GB", "is no share"),
        ("--kv-bytes", "38%", "is no size"),
        ("--kv-bytes", "2e9", "must be a whole number"),
    ):
        with pytest.raises(BudgetError, match=message):
            invoke("solve", calibrated, "--out", plan, option, word)


def test_bytes_and_the_file_are_shown(calibrated: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    said = invoke("solve", calibrated, "--out", plan, "--fraction", "0.5", "--multiple", 1)
    for shown in (said, invoke("inspect", plan)):
        assert f"budgets          {plan}" in shown
        assert "3,840 bytes a row, 50.0% of the 7,680 bytes of a full cache of 30 tokens" in shown
    assert json.loads(invoke("inspect", plan, "--json"))["budgets"] == str(plan)


def test_bytes_without_a_context_are_shown(tmp_path: Path) -> None:
    made = xkv_fx.budgets.Provenance(kv_bytes=1000, full_kv_bytes=4000)
    xkv_fx.Budgets((12, 17), provenance=made).save(tmp_path / "plan.json")
    (line,) = (line for line in invoke("inspect", tmp_path / "plan.json").splitlines() if line.startswith("kv_bytes"))
    assert line.split(maxsplit=1)[1].strip() == "1,000 bytes a row"


def test_a_limit_far_above_what_can_be_used_is_said(calibrated: Path, tmp_path: Path) -> None:
    result = RUN.invoke(cli.app, ["solve", str(calibrated), "--out", str(tmp_path / "plan.json"), "--kv-bytes", "2GB"])
    assert result.exit_code == 0
    assert "warning: kv_bytes of 2,000,000,000 bytes" in result.stderr
    assert "serves up to context=7812500" in result.stderr


def test_recent_of_window_layers_is_what_describe_says(tmp_path: Path) -> None:
    layers = captured("gemma3", 2, 1).layers
    calibration = xkv_fx.Calibration(
        np.full((1, 2, 2), 0.1, np.float32), (0.25, 0.5), (40,), 4, xkv_fx.Policy(), layers, "a model"
    )
    plan = xkv_fx.solve(calibration, fraction=0.9, multiple=1)
    plan.save(tmp_path / "plan.json")
    again = xkv_fx.Budgets.load(tmp_path / "plan.json")
    assert again == plan
    described = [slots.recent for slots in slot_plans(again, layers)]
    assert list(again.recent) == described
    assert described[0] == 8, "a whole sliding window"
    shown = [line.split("│") for line in invoke("inspect", tmp_path / "plan.json").splitlines() if "│" in line]
    assert [int(row[3]) for row in shown] == described


def test_fit(tmp_path: Path, text: Path) -> None:
    plan, report, picture = tmp_path / "plan.json", tmp_path / "report.json", tmp_path / "fit.svg"
    options = ["--prompts", text, "--length", "24", "--continuation", "6", "--scorers", "snapkv", "--fraction", "25%"]
    shown = invoke("fit", "--out", plan, "--report", report, "--picture", picture, *options)
    found = json.loads(report.read_text())
    assert xkv_fx.Budgets.load(plan).to_dict() == found["budgets"]
    assert "nats" in shown
    assert picture.stat().st_size > 1000
    parts = plan.with_name("plan.json.parts")
    assert not parts.exists()
    parts.mkdir()
    (parts / "mine.txt").write_text("not ours to delete")
    told = json.loads(invoke("fit", "--out", plan, "--json", *options))
    assert told["candidates"] == found["candidates"]
    assert [path.name for path in parts.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "--out", "x", "--prompts", "{no}"], "there is no file {no}"),
        (["calibrate", "--out", "x", "--prompts", "{folder}"], "{folder} is a folder; give the name of a text file"),
        (["verify", "plan.json", "--prompts", "{empty}"], "{empty} is empty; give a file with text in it"),
        (["solve", "c", "--out", "x", "--fraction", "0.5", "--holdout", "{no}"], "there is no file {no}"),
        (["fit", "--out", "x", "--memory", "1MB", "--prompts", "{no}"], "there is no file {no}"),
        (["generate", "plan.json", "--prompt-file", "{no}"], "there is no file {no}"),
        (["verify", "{no}", "--prompts", "{text}"], "there is no file {no}"),
        (["export", "{no}", "--out", "{folder}"], "{folder} exists; remove it, or choose another folder"),
        (["inspect", "{no}"], "there is no file {no}"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_paths_are_looked_at_before_a_model_is_loaded(
    arguments: list[str], message: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_model(name: str) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("xkv_fx.hf.models.load_model", load_model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    paths = {"no": tmp_path / "nowhere", "folder": tmp_path, "empty": tmp_path / "empty", "text": text}
    with pytest.raises(xkv_fx.XkvError, match=f"^{message.format(**paths)}"):
        invoke(*(argument.format(**paths) for argument in arguments))


def test_inspect_shows_what_was_measured(calibrated: Path) -> None:
    said = invoke("inspect", calibrated)
    assert said == f"{calibrated}\n{xkv_fx.Calibration.load(calibrated)}\n"
    shown = json.loads(invoke("inspect", calibrated, "--json"))
    assert (shown["calibration"], shown["prompts"], shown["policy"]["eviction"]) == (str(calibrated), 2, "append")
