"""The Triton decode kernels, on a machine without a GPU: what they compute, by Triton's interpreter, and that they
compile for GPUs. Each runs in a process of its own, since the interpreter is chosen when triton is first imported."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from exhaustive import exhaustive
from old_versions import OLD_TORCH

TESTS = Path(__file__).parents[2]
ROOT = TESTS.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*arguments: str, **environment: str) -> str:
    told = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    path = os.pathsep.join([str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**told, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(OLD_TORCH, reason="wrap_triton of torch 2.11 takes no interpreted kernels")
@pytest.mark.parametrize("cases", ["triton_cases", "triton_coded_cases"])
def test_under_the_interpreter_they_are_the_references(cases: str) -> None:
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{cases}.py", TRITON_INTERPRET="1")
    assert re.search(r"^\d+ passed", out, re.MULTILINE), out


@exhaustive
def test_they_compile_for_gpus(tmp_path: Path) -> None:
    """With tensor cores and asynchronous copies, in the shared memory that every GPU since Ampere has. Over codes: no
    registers are spilled into memory, and codes are copied 16 bytes at once."""
    out = run("tests/compile_triton.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert len(out.splitlines()) == 10, out
