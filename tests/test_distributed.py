"""Several processes, as torchrun starts them: what they measure together is what one measures alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from exhaustive import exhaustive
from plain_models import HEADS, Attention, Decoder, example, sdpa
from saved_models import save_model
from tiny_models import SIZES, build, gemma2, llama, mistral, qwen3, random_ids
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

import xkv_fx
from xkv_fx import Budgets, Calibration, Profile
from xkv_fx.errors import UnsupportedModelError

TESTS = Path(__file__).parent
PROCESSES = 2
SPLIT = {
    "inductor": ("full", "half"), "tied": ("full", "half", "scored"), "gemma2": ("full", "half", "scored"),
    "qwen3": ("full", "half"), "mistral": ("full", "half"), "phi3": ("full", "half"),
}  # fmt: skip
REFUSED = {
    "scorer": "BudgetError", "measured scorer": "BudgetError", "engine": "UnsupportedModelError",
    "torch.compile": "UnsupportedModelError", "group": "BudgetError", "resume": "BudgetError",
    "statistics": "BudgetError", "other's session": "SessionError",
}  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))), "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: str | Path) -> str:
    """What the processes print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(folder: Path, models: dict[str, PreTrainedModel], *jobs: str) -> list[dict[str, Any]]:
    """What each process found."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
    torchrun(TESTS / "distributed_program.py", folder, *jobs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results(tmp_path_factory.mktemp("processes"), {"llama": llama(1)}, "measuring", "errors", "split")


@exhaustive
def test_what_is_measured_together_is_what_one_measures_alone(found: list[dict[str, Any]]) -> None:
    first, second = (process["measuring"] for process in found)
    assert first["together"] == first["alone"] == second["together"]
    assert first["seen"] == [1, 2, 3]
    assert second["seen"] == [], "one of them reports"
    assert first["parts"] == 3


@exhaustive
def test_the_command_line_shares_prompts_among_processes(tmp_path: Path) -> None:
    texts = [tmp_path / f"{seed}.txt" for seed in range(3)]
    for seed, text in enumerate(texts):
        text.write_text(" ".join(f"w{token}" for token in random_ids(1, 60, seed)[0].tolist()))
    save_model(tmp_path / "model")
    given = ["--model", tmp_path / "model", *(part for text in texts for part in ("--prompts", text))]
    for command, kind in (("profile", Profile), ("calibrate", Calibration)):
        options = [*given, "--length", "30", "--json"]
        printed = torchrun("-m", "xkv_fx.cli", command, "--out", tmp_path / "together", *options)
        assert len(printed.splitlines()) == 1, "one of them prints"
        alone = [sys.executable, "-m", "xkv_fx.cli", command, "--out", tmp_path / "alone", *options]
        subprocess.run([*map(str, alone)], check=True, env=environment())
        assert kind.load(tmp_path / "together") == kind.load(tmp_path / "alone")
        assert sorted(path.name for path in tmp_path.glob("together*")) == ["together"]
    with pytest.raises(AssertionError, match="runs in one process"):
        torchrun("-m", "xkv_fx.cli", "verify", tmp_path / "no plan", *given)


@exhaustive
def test_an_error_in_one_process_is_raised_in_all(found: list[dict[str, Any]]) -> None:
    first, second = (process["errors"] for process in found)
    assert second["in a round"] == ["PromptError", "not this one"]
    assert first["in a round"] == ["PromptError", "in process 1: not this one"]
    assert second["before"][0] == "FileExistsError"
    assert first["before"][0] == "XkvError"
    assert first["before"][1].startswith("in process 1: FileExistsError")
    for process in (first, second):
        assert process["other prompts"][0] == "BudgetError"
        assert "not given the same" in process["other prompts"][1]
        assert process["no group"][0] == "BudgetError"


def check_split(
    processes: list[dict[str, Any]], plans: Sequence[str] = ("full", "half"), parts: int = PROCESSES
) -> None:
    """What processes found that share a model, whose KV heads are in so many parts, beside the whole model."""
    for process in processes:
        assert process["untouched"]
        for plan in plans:
            part, whole = process[plan]["tokens"]
            assert part == whole
            assert process[plan]["error"] < 1e-4
            assert process[plan]["kept"], "each process keeps for its heads what the whole model keeps for them"
            of_part, of_session, of_whole = process[plan]["bytes"]
            assert of_part * parts == of_whole
            assert of_part == of_session == process[plan]["planned"]


@exhaustive
def test_a_model_whose_heads_are_shared_is_the_whole_one(found: list[dict[str, Any]]) -> None:
    check_split([process["split"] for process in found])


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x


def test_a_plain_module_that_talks_to_processes_is_refused() -> None:
    """Nobody knows what the others have of it."""
    model = Decoder(lambda: Attention(sdpa, HEADS, interleave=False), mix=Summed())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UnsupportedModelError, match="Decoder cannot be captured: all_reduce talks to other proc"):
            xkv_fx.transform(model, Budgets((8, 8)), example_inputs=example())
    finally:
        dist.destroy_process_group()


@exhaustive
def test_a_model_whose_heads_are_shared_is_measured(tmp_path: Path) -> None:
    for process in results(tmp_path, {"llama": llama(vocab_size=62)}, "split_planning"):
        found = process["split_planning"]
        assert found["curves"] < 1e-5
        assert found["kl"] < 1e-4
        assert len(found["means"]) == 2
        assert max(found["means"]) < 1e-5
        assert found["stored"][0] == found["stored"][1]
        assert found["part"]
        for name, kind in REFUSED.items():
            assert found["refused"][name][0] == kind, (name, found["refused"][name])


@exhaustive
def test_blocks_of_docs_run(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "llama")
    torchrun(TESTS / "distributed_program.py", tmp_path, "docs")
    assert Calibration.load(tmp_path / "calibration.safetensors").lengths == (44, 44)


@exhaustive
def test_layers_may_be_split_in_other_ways(tmp_path: Path) -> None:
    uneven = {"intermediate_size": 49, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    models = {
        "llama": llama(),
        "tied": llama(**uneven),
        "gemma2": gemma2(),
        "qwen3": qwen3(),
        "mistral": mistral(),
        "phi3": build(Phi3ForCausalLM, Phi3Config(**SIZES, num_hidden_layers=2)),
        "mixtral": build(MixtralForCausalLM, MixtralConfig(**SIZES, num_hidden_layers=1, num_local_experts=2)),
        "odd": llama(1, num_attention_heads=6, num_key_value_heads=3, hidden_size=48),
    }
    found = [process["families"] for process in results(tmp_path, models, "families")]
    for name, plans in SPLIT.items():
        whole_heads = name == "phi3"  # its queries, keys and values are in one matrix, which every process computes
        check_split([process["split"][name] for process in found], plans, 1 if whole_heads else PROCESSES)
    for process in found:
        kind, message = process["refused"]["mixtral"]
        assert kind == "UnsupportedModelError"
        assert "moe_tp_experts" in message
        kind, message = process["refused"]["odd"]
        assert kind == "UnsupportedModelError"
        assert "3 KV heads cannot be split evenly among 2" in message
