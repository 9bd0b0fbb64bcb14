"""`xkv-fx eval`, run in process on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from old_versions import needs_fp8
from ready_models import remember_programs
from tiny_models import llama, mistral, random_ids
from typer.testing import CliRunner
from word_tokenizer import WordTokenizer

import xkv_fx
from xkv_fx import Budgets, cli
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BackendError, BudgetError, PromptError, UnsupportedModelError
from xkv_fx.evaluation.quality import command
from xkv_fx.evaluation.quality.quantized import QUANTIZED, Quantized
from xkv_fx.evaluation.quality.smallest import smallest_shares
from xkv_fx.evaluation.texts import source_code
from xkv_fx.hf.capture import capture

RUN = CliRunner()
MODEL = llama(2, vocab_size=500)
SHORT = ["--tasks", "needle_single,continuation", "--length", "160", "--instances", "1", "--quantized", ""]


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    return capture(MODEL, check=False)


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch: pytest.MonkeyPatch, captured: CapturedModel) -> None:
    monkeypatch.setattr("xkv_fx.hf.models.load_model", lambda name: (MODEL, WordTokenizer(500)))
    for module in ("hf.capture", "evaluation.quality.smallest"):
        monkeypatch.setattr(f"xkv_fx.{module}.capture", lambda *args, **options: captured)
    remember_programs(monkeypatch)
    for module in ("evaluate", "command"):  # all of it takes seconds in a tokenizer of plain Python
        monkeypatch.setattr(f"xkv_fx.evaluation.quality.{module}.source_code", lambda: source_code()[:60_000])


@pytest.fixture(scope="module")
def measured(captured: CapturedModel, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("measured")
    prompts = [random_ids(1, 60, seed=seed) for seed in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xkv_fx.hf.capture.capture", lambda *args, **options: captured)
        xkv_fx.profile(MODEL, prompts).save(folder / "profile.safetensors")
        xkv_fx.calibrate(MODEL, prompts, continuation=8).save(folder / "calibration.safetensors")
        both = xkv_fx.calibrate(MODEL, prompts, continuation=8, formats=("model", "int8"))
        both.save(folder / "joint.safetensors")
    return [part for name in ("profile", "calibration") for part in ("--measured", str(folder / f"{name}.safetensors"))]


def invoke(*arguments: Any) -> str:
    result = RUN.invoke(cli.app, ["eval", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_everything_it_writes(measured: list[str], tmp_path: Path) -> None:
    out, pictures = tmp_path / "result.json", tmp_path / "pictures"
    shown = invoke(
        *SHORT, *measured, "--fractions", "0.3", "--out", out, "--pictures", pictures, "--smallest", "--json"
    )
    data = json.loads(shown)
    assert data == json.loads(out.read_text())
    assert {(plan["name"], plan["size"]) for plan in data["plans"]} == {
        ("full", "full"), ("xkv", "30.0%"), ("calibrated", "30.0%"), ("uniform", "30.0%"),
    }  # fmt: skip
    assert data["not_installed"] == {}
    assert set(data["smallest"]["kl"]) == {"uniform", "xkv", "calibrated"}
    assert "**needle_single**, asked in a second turn, 1 examples" in out.with_suffix(".md").read_text()
    assert not out.with_name("result.json.parts").exists()
    for name in ("quality", "capacities", "retention"):
        assert (pictures / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_formats_alone_capacities_alone_and_both(measured: list[str], tmp_path: Path) -> None:
    joint = str(Path(measured[-1]).with_name("joint.safetensors"))
    asked = ["--tasks", "needle_single", "--forms", "inside", *SHORT[2:], "--fractions", "0.5"]
    data = json.loads(invoke(*asked, "--measured", measured[-1], "--measured", joint, "--json"))
    assert {row["name"] for row in data["rows"]} == {"full", "calibrated", "joint", "uniform", "all int8"}
    assert data["dtype"] == "bfloat16"
    assert data["full_bytes"] == 2 * 160 * 64
    shown = invoke(*asked, "--formats", "int4,int8/int4,model")
    assert [name for name in ("all int4", "all int8/int4", "all int8") if f"| {name} |" in shown] == [
        "all int4", "all int8/int4",
    ]  # fmt: skip
    with pytest.raises(BudgetError, match="unknown format 'int3' of the keys of what is named 'int3/int4'"):
        invoke(*asked, "--formats", "int3/int4")
    with pytest.raises(BackendError, match="unknown dtype 'int8'"):
        invoke(*asked, "--bytes-of", "int8")


def test_budgets_files_are_named_by_their_files(tmp_path: Path) -> None:
    Budgets((60, 20)).save(tmp_path / "mine.json")
    shown = invoke(*SHORT, "--plans", tmp_path / "mine.json", "--fractions", "", "--forms", "inside")
    assert "| mine |" in shown
    assert "| uniform |" in shown

    Budgets((24, 24)).save(tmp_path / "theirs.json")
    alone = ["--tasks", "needle_single", "--forms", "inside", *SHORT[2:]]
    joined = invoke(*alone, "--plans", tmp_path / "theirs.json", "--fractions", "0.15", "--json")
    assert [(row["name"], row["size"]) for row in json.loads(joined)["rows"]] == [
        ("full", "full"), ("uniform", "15.0%"), ("theirs", "15.0%"),
    ]  # fmt: skip
    with pytest.raises(BudgetError, match=r"equal bytes, but mine takes 5,120, which is none of 15.0% 3,072"):
        invoke(*alone, "--plans", tmp_path / "mine.json", "--fractions", "0.15")


def test_interruption_says_where_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = command.evaluate

    def interrupted(*args: Any, **options: Any) -> Any:
        def stop(done: int, total: int) -> None:
            if done == total:
                raise KeyboardInterrupt

        return evaluate(*args, **{**options, "progress": stop})

    monkeypatch.setattr(command, "evaluate", interrupted)
    out = tmp_path / "result.json"
    arguments = [*SHORT, "--fractions", "0.25", "--out", str(out)]
    result = RUN.invoke(cli.app, ["eval", *arguments])
    assert result.exit_code == 130
    assert "goes on from there" in result.stderr.replace("\n", " ")
    assert len(list((tmp_path / "result.json.parts").iterdir())) == 1 + 2 * 2, "both forms of the needle"
    monkeypatch.setattr(command, "evaluate", evaluate)
    invoke(*arguments)
    assert out.exists()


def test_kvpress_is_asked_of_its_own_python_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkv_fx.evaluation.speed.bench_command.locate", lambda name: (tmp_path, None))
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"job": 0, "answers": [[5, 6]]}'\n""")
    python.chmod(0o755)
    asked = ["--tasks", "needle_single", "--forms", "inside", *SHORT[2:], "--fractions", "0.5", "--json"]
    data = json.loads(invoke(*asked, "--kvpress-python", python, "--presses", "snapkv"))
    row = next(row for row in data["rows"] if row["name"] == "kvpress snapkv")
    assert (row["size"], row["policy"], row["kv_bytes"]) == ("50.0%", None, data["full_bytes"] // 2)
    assert (len(row["texts"]), row["means"]) == (1, {"score": 0.0})
    with pytest.raises(BackendError, match=r"kvpress did not answer adakv at 50.0% on needle_single"):
        invoke(*asked, "--kvpress-python", python, "--out", tmp_path / "found.json")


@needs_fp8
def test_a_quantized_cache_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZED, "int4", Quantized("hqq", 4, "no_such_module", "hqq"))
    monkeypatch.setitem(QUANTIZED, "int8", Quantized("hqq", 8, "no_such_module", "hqq"))
    asked = ["--tasks", "needle_single", "--forms", "inside", "--length", "160", "--instances", "1"]
    data = json.loads(invoke(*asked, "--fractions", "0.3", "--json"))
    assert data["not_installed"] == {"int8": "pip install hqq", "int4": "pip install hqq"}
    sizes = {(row["name"], row["size"]) for row in data["rows"]}
    assert {("fp8", "fp8"), ("uniform", "fp8 bytes")} <= sizes
    fp8, uniform = (next(row for row in data["rows"] if row["size"] == size) for size in ("fp8", "fp8 bytes"))
    assert fp8["kv_bytes"] * 0.9 < uniform["kv_bytes"] <= fp8["kv_bytes"], "as many whole slots as fit"
    with pytest.raises(BackendError, match="not installed; pip install hqq"):
        invoke(*asked, "--quantized", "int4")
    with pytest.raises(BackendError, match="unknown quantized cache 'int3'; choose from int8, int4, fp8"):
        invoke(*asked, "--quantized", "int3")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--tasks", "haystack"], PromptError, "unknown task 'haystack'"),
        (["--forms", "before"], PromptError, "forms must be some of"),
        (["--fractions", "half"], BudgetError, "fractions must be a number; got 'half'"),
        (["--fractions", "nan"], BudgetError, "must be finite"),
        (["--fractions", "2"], BudgetError, "fraction must be above 0"),
        (["--fractions", ""], BudgetError, "nothing to compare"),
        (["--tasks", "passage_qa", "--length", "90"], PromptError, "'passage_qa': 90 tokens are too few"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        invoke(*SHORT, *arguments)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Budgets((60, 20)).save(tmp_path / folder / "plan.json")
    with pytest.raises(BudgetError, match="two budgets files have one name"):
        invoke(*SHORT, "--plans", tmp_path / "a/plan.json", "--plans", tmp_path / "b/plan.json")


def test_the_smallest_share_is_where_the_bound_is_held(measured: list[str]) -> None:
    calibration = xkv_fx.Calibration.load(measured[3])
    prompts = [random_ids(1, 60, seed=seed) for seed in (5, 6)]
    ways = {"calibrated": (calibration, "calibrated"), "uniform": (calibration, "uniform")}
    steps: list[tuple[int, int]] = []
    bound = 0.5
    found = smallest_shares(MODEL, ways, prompts, bound, continuation=8, progress=lambda *step: steps.append(step))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for name, share in found.items():
        assert share is not None
        means = []
        for fraction in (share, share - 1 / 49):
            plan = xkv_fx.solve(calibration, fraction=fraction, context=52, allocator=name)
            means.append(float(torch.tensor(xkv_fx.verify(MODEL, plan, prompts, continuation=8).kl).mean()))
        assert means[0] <= bound < means[1]
    assert smallest_shares(MODEL, ways, prompts, 1e-9, continuation=8, rounds=1) == {
        "calibrated": None,
        "uniform": None,
    }
    with pytest.raises(BudgetError, match="at least one way"):
        smallest_shares(MODEL, {}, prompts)


def test_the_smallest_share_of_joint_plans_is_of_the_bytes_that_are_counted(measured: list[str]) -> None:
    joint = xkv_fx.Calibration.load(Path(measured[3]).with_name("joint.safetensors"))
    prompts, bound = [random_ids(1, 60, seed=seed) for seed in (5, 6)], 0.5
    ways = {"joint": (joint, None)}
    of_bfloat16, of_float32 = (
        smallest_shares(MODEL, ways, prompts, bound, continuation=8, rounds=1, dtype=dtype)["joint"]
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert of_float32 is not None
    assert of_bfloat16 is not None
    assert of_float32 < of_bfloat16, "int8 takes less of float32's bytes"


@needs_fp8
def test_a_model_without_a_quantized_cache_is_said_so() -> None:
    with pytest.raises(UnsupportedModelError, match="cannot quantize this model's cache"):
        QUANTIZED["fp8"].new_cache(mistral().config)
