"""The examples that need no download run as they stand."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from exhaustive import exhaustive

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
