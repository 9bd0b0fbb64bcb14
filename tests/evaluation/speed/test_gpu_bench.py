"""The bench for GPUs: that the program runs, on a tiny model and a CPU, and what it says where there is no GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import typer
from exhaustive import exhaustive
from typer.testing import CliRunner

from xkv_fx.errors import BudgetError, UnsupportedModelError
from xkv_fx.evaluation.speed.bench_result import Run
from xkv_fx.evaluation.speed.gpu_bench import NOT_MEASURED, RATIOS, main, ratios_of

app = typer.Typer()
app.command()(main)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


@exhaustive
def test_on_a_cpu() -> None:
    sizes = ("--context", "200", "--batch", "2", "--steps", "2", "--rounds", "2", "--fraction", "0.384")
    done = run("--preset", "tiny", "--device", "cpu", *sizes, "--no-compiled")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert {"runs", "ratios", "machine"} <= set(found)
    runs = {one["name"]: one for one in found["runs"]}
    assert set(runs) == {"decode-attention", "full", "ours-0.384", "dynamic"}
    assert runs["ours-0.384"]["kv_bytes"] == 2 * 2 * 77 * 2 * 2 * 16 * 4  # layers, rows, slots, heads, K and V, size
    assert set(found["ratios"]) == set(RATIOS)
    assert found["ratios"]["throughput_to_full"]["ours-0.384"] > 0
    assert found["ratios"]["throughput_to_static_cache"] == NOT_MEASURED


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    found = json.loads(run().output)
    assert found["runs"] == []
    assert set(found["ratios"].values()) == {NOT_MEASURED}


def test_ratios() -> None:
    def at(name: str, speed: float) -> Run:
        return Run(name, 1, 100, tokens_per_second=speed)

    runs = [at("full", 10.0), at("ours-0.384", 24.0), at("ours-0.1", 60.0), at("ours-0.05", 90.0), at("dynamic", 5.0)]
    attention = [{"rows": 1, "slots": 100, "share": 0.9}]
    ratios = ratios_of(attention, [*runs, Run("static", 0, 100, skipped="not one row fits")])
    assert ratios["throughput_to_full"] == {"ours-0.384": 2.4, "ours-0.1": 6.0, "ours-0.05": 9.0}
    assert ratios["throughput_to_dynamic_cache"]["ours-0.384"] == 4.8
    assert ratios["throughput_to_static_cache"] == NOT_MEASURED
    assert ratios["fraction_of_5.5_times_full"] == 0.1
    assert ratios["attention_share_of_copy_speed"] == {"1 rows, 100 slots": 0.9}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--context", "5000"), BudgetError),
        (("--fraction", "1.5"), BudgetError),
        (("--context", "0"), BudgetError),
        (("--preset", "none"), UnsupportedModelError),
    ],
    ids=str,
)
def test_bad_sizes(arguments: tuple[str, ...], error: type[Exception]) -> None:
    assert isinstance(run("--preset", "tiny", "--device", "cpu", "--batch", "1", *arguments).exception, error)
    if error is BudgetError:
        assert isinstance(run("--preset", "tiny", "--device", "cpu").exception, BudgetError)
