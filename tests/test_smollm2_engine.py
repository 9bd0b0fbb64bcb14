"""An engine of SmolLM2, in processes of their own. Compiling it takes long; `make test-exhaustive` does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import padded
from exhaustive import exhaustive
from safetensors.torch import load_file, save_file

import xkv_fx
from xkv_fx.evaluation.texts import documentation
from xkv_fx.hf.models import load_model

pytestmark = exhaustive
LAYERS = 30
BUDGETS = xkv_fx.Budgets(tuple(128 + 16 * (layer % 3) for layer in range(LAYERS)))
NEW = 64

# Generates from the ids, mask and count of a file; writes tokens, the prompt's logits, and memory along the way.
CHILD = """
import json, sys, time
import torch, xkv_fx
from safetensors.torch import load_file, save_file

def resident(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))

before = resident("VmRSS")
engine = xkv_fx.load(sys.argv[1])
given = load_file(sys.argv[2])
ids, mask, new = given["ids"], given["mask"], int(given["new"])
logits = engine.new_session().feed(ids, valid=mask)
warm = engine.generate(ids, 16, attention_mask=mask)
middle = resident("VmRSS")
tokens = engine.generate(ids, new, attention_mask=mask)
save_file({"tokens": tokens, "logits": logits}, sys.argv[3])
print(json.dumps({"before": before, "middle": middle, "after": resident("VmRSS"), "peak": resident("VmHWM")}))
assert "transformers" not in sys.modules
"""


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, torch.Tensor]:
    model, tokenizer = load_model("smollm2")
    return model, torch.tensor(tokenizer(documentation()[:20_000])["input_ids"])


def exported(model: Any, rows: int, folder: Path) -> Any:
    llm = xkv_fx.transform(model, BUDGETS, batch_size=rows, backend="eager")
    xkv_fx.export(llm, folder)
    return llm


@pytest.fixture(scope="module")
def single(smollm2: tuple[Any, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("engines") / "single"
    return exported(smollm2[0], 1, folder), folder


def in_a_process(
    folder: Path, ids: torch.Tensor, mask: torch.Tensor, new: int, work: Path
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    save_file({"ids": ids, "mask": mask, "new": torch.tensor(new)}, work / "in.safetensors")
    command = [sys.executable, "-c", CHILD, str(folder), str(work / "in.safetensors"), str(work / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(work / "out.safetensors"), json.loads(done.stdout)


def check_tokens(llm: Any, folder: Path, ids: torch.Tensor, mask: torch.Tensor, new: int, work: Path) -> dict[str, int]:
    found, memory = in_a_process(folder, ids, mask, new, work)
    expected = llm.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    logits = llm.new_session().session.feed(ids, valid=mask)
    assert float((found["logits"] - logits).abs().max()) < 1e-4
    assert torch.equal(found["tokens"], expected)
    return memory


@pytest.mark.parametrize("length", [50, 400])
def test_one_row(smollm2: tuple[Any, torch.Tensor], single: tuple[Any, Path], tmp_path: Path, length: int) -> None:
    ids = smollm2[1][length : 2 * length][None]
    check_tokens(*single, ids, torch.ones_like(ids, dtype=torch.bool), NEW, tmp_path)


def test_a_ragged_batch_of_three(smollm2: tuple[Any, torch.Tensor], tmp_path: Path) -> None:
    model, text = smollm2
    llm = exported(model, 3, tmp_path / "engine")
    ids, mask = padded([text[None, :30], text[None, 500:700], text[None, 900:990]], "left")
    check_tokens(llm, tmp_path / "engine", ids, mask, NEW, tmp_path)


def test_weights_are_there_once_and_memory_is_flat(
    smollm2: tuple[Any, torch.Tensor], single: tuple[Any, Path], tmp_path: Path
) -> None:
    weights = sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in smollm2[0].parameters()}.values())
    size = sum(path.stat().st_size for path in single[1].rglob("*") if path.is_file())
    assert size < weights + 40e6
    ids = smollm2[1][None, :200]
    memory = check_tokens(*single, ids, torch.ones_like(ids, dtype=torch.bool), 1000, tmp_path)
    assert memory["after"] - memory["middle"] < 5e6
    assert memory["peak"] - memory["before"] < 1.5 * weights
