"""The examples that need no download run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_example(name: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_scorer() -> None:
    output = run_example("own_scorer.py")
    assert "Peak(queries=8)" in output
    assert "kept (24, 12) of 60 prompt tokens, a layer and KV head: 4608 bytes" in output
    generated = output.splitlines()[-1]
    assert generated.startswith("generated [")
    assert generated.count(",") == 7


def test_torch_compile_backend() -> None:
    output = run_example("torch_compile_backend.py")
    assert "60 tokens of prompt, 4608 bytes kept, then [" in output
    assert "and on, after another turn, [" in output
    assert "insert_decode_cache    matched     2" in output
    assert output.splitlines()[-1] == "graphs compiled by Dynamo: 2"
