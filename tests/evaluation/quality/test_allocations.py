"""Plans beside one another on held-out text: what is measured, what is kept, and what the tables say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ready_models import captured, model, remember_captures
from tiny_models import random_ids
from word_tokenizer import WordTokenizer

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.errors import BackendError, BudgetError
from xkv_fx.evaluation.quality import allocations, sources
from xkv_fx.evaluation.quality.allocations import Line, as_tables, nats
from xkv_fx.evaluation.quality.held_out import measure_held_out
from xkv_fx.evaluation.texts import documentation, source_code
from xkv_fx.planning.measure import held_out as measuring

APPEND, RING = Policy(eviction="append"), Policy(eviction="ring")
NEW = 6
PROMPTS = [random_ids(1, 40, seed=seed) for seed in range(3)]
PLANS = (
    Budgets((20, 6), APPEND),
    Budgets((20, 6), RING),
    Budgets((34, 20), APPEND, formats=(("int8", "int4"), ("int4", "int4"))),
)


@pytest.fixture(autouse=True)
def _captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_captures(monkeypatch)


def ready() -> Any:
    return captured("llama", 2, 1)


# Held-out prompts


def test_plans_of_several_evictions_and_scorers_stray_as_verify_says() -> None:
    plans = (*PLANS, Budgets((20, 6), Policy("reconstruction", eviction="append")))
    found = measure_held_out(ready(), plans, PROMPTS, NEW)
    for at, plan in enumerate(plans):
        report = xkv_fx.verify(model(), plan, PROMPTS, continuation=NEW)
        np.testing.assert_allclose(found.kl[:, at], report.kl, rtol=1e-3)


@pytest.mark.parametrize("plan", PLANS, ids=["append", "ring", "formats"])
def test_agreement_is_that_of_tokens_decoded_one_by_one(plan: Budgets) -> None:
    found = measure_held_out(ready(), [plan], PROMPTS, NEW)
    for prompt, ids in enumerate(PROMPTS):
        preferred = []
        for budgets in (Budgets.full(2, 40), plan):
            llm = xkv_fx.transform(model(), budgets, backend="eager", check=False, max_new_tokens=NEW)
            session = llm.new_session()
            llm(ids[:, :-NEW], past_key_values=session, logits_to_keep=1)
            steps = [llm(token, past_key_values=session, decoding=True).logits for token in ids[:, -NEW:].split(1, 1)]
            preferred.append(torch.cat(steps, 1).argmax(-1))
        assert found.agreement[prompt, 0] == float((preferred[0] == preferred[1]).double().mean())


def test_what_was_measured_is_taken_and_other_plans_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run_full = measuring.run_full
    monkeypatch.setattr(measuring, "run_full", lambda *args: runs.append(1) or run_full(*args))

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_held_out(ready(), PLANS[:1], PROMPTS, NEW, tmp_path, stop)
    assert (len(runs), len(list(tmp_path.iterdir()))) == (2, 2)
    first = measure_held_out(ready(), PLANS[:1], PROMPTS, NEW, tmp_path)
    assert len(runs) == 3
    more = measure_held_out(ready(), PLANS, PROMPTS, NEW, tmp_path)
    assert len(runs) == 6
    np.testing.assert_array_equal(more.kl[:, 0], first.kl[:, 0])
    again = measure_held_out(ready(), PLANS[::-1], PROMPTS, NEW, tmp_path)
    assert len(runs) == 6
    np.testing.assert_array_equal(again.kl[:, ::-1], more.kl)
    np.testing.assert_array_equal(again.agreement[:, ::-1], more.agreement)
    for path in tmp_path.iterdir():
        path.write_text(path.read_text().replace("0.", "1.", 1))
    np.testing.assert_allclose(measure_held_out(ready(), PLANS, PROMPTS, NEW, tmp_path).kl, more.kl)
    assert len(runs) == 9, "damaged: measured again"
    measure_held_out(ready(), PLANS[:1], PROMPTS, NEW - 1, tmp_path)
    assert len(runs) == 12, "another continuation"


def test_what_cannot_be_measured_together_is_refused() -> None:
    for plans, prompts in (((), PROMPTS), (PLANS, [])):
        with pytest.raises(BudgetError, match="give plans, and prompts to measure them on"):
            measure_held_out(ready(), plans, prompts, NEW)


# The command


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = WordTokenizer(61)
    monkeypatch.setattr(allocations, "load_model", lambda name: (model(), tokenizer))
    monkeypatch.setattr(allocations, "capture", lambda *args, **options: ready())
    texts = {"documentation": documentation()[:20_000], "source code": source_code()[:20_000]}
    monkeypatch.setattr(sources, "KINDS", {kind: lambda text=text: text for kind, text in texts.items()})


def run(out: Path, *options: str) -> dict[str, Any]:
    short = ["--context", "40", "--continuation", "6", "--calibrate-on", "2", "--held-out", "2"]
    allocations.main(["--out", str(out), *short, "--fractions", "0.3", "0.6", *options])
    found: dict[str, Any] = json.loads((out / "allocations.json").read_text())
    return found


@pytest.mark.usefixtures("_small")
def test_the_whole_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path)
    rows = {(row["eviction"], row["kind"], row["size"], row["name"]): row for row in found["rows"]}
    names = {"uniform", "calibrated", "joint", "all int8", "all int8/int4", "all int4"}
    assert {key[3] for key in rows} == names
    assert len(rows) == 2 * 2 * 2 * len(names)
    assert found["full_bytes"] == 2 * 40 * 64
    row = rows["append", "source code", "60.0%", "all int8"]
    assert row["share"] == pytest.approx(0.6, abs=0.01)
    assert (row["bits"], len(row["kl"]), len(row["agreement"])) == (12, 2, 2)
    assert row["mean_kl"] == pytest.approx(np.mean(row["kl"]))
    assert row["plan"]["formats"] == [["int8", "int8"]] * 2
    text = (tmp_path / "allocations.md").read_text()
    assert text in capsys.readouterr().out
    assert "| **joint against capacities alone** | **" in text
    assert "| **joint against the best single format** | **" in text
    assert '`eviction="ring"`, source code (another kind of text), 2 prompts' in text
    for name in ("calibration-append", "calibration-formats-ring"):
        assert (tmp_path / f"{name}.safetensors").is_file()

    monkeypatch.setattr(sources, "measure_calibration", None)
    monkeypatch.setattr(measuring, "run_full", None)
    given = [str(path) for path in tmp_path.glob("calibration-*.safetensors")]
    again = run(tmp_path, "--measured", *given)
    assert again["rows"] == found["rows"], "the calibrations were given, and every prompt was measured"


@pytest.mark.usefixtures("_small")
def test_allocators_of_a_profile_are_compared_too(tmp_path: Path) -> None:
    found = run(tmp_path, "--evictions", "append", "--allocators", "xkv", "entropy", "--bytes-of", "float32")
    assert {row["name"] for row in found["rows"]} == {"uniform", "xkv", "entropy"}
    assert found["full_bytes"] == 2 * 40 * 128
    with pytest.raises(BackendError, match="unknown dtype 'int3'"):
        run(tmp_path, "--bytes-of", "int3")


@pytest.mark.usefixtures("_small")
def test_a_profile_of_another_scorer_stands_beside_calibrations(tmp_path: Path) -> None:
    policy = Policy("reconstruction", {"chunk": 64}, eviction="append")
    xkv_fx.profile(model(), PROMPTS, policy=policy, by="head").save(tmp_path / "profile.safetensors")
    xkv_fx.calibrate(model(), PROMPTS, policy=APPEND, continuation=NEW).save(tmp_path / "calibration.safetensors")
    given = [str(tmp_path / f"{name}.safetensors") for name in ("profile", "calibration")]
    options = ("--evictions", "append", "--allocators", "calibrated", "xkv", "--bytes-of", "float32")
    found = run(tmp_path, "--measured", *given, *options)
    names = ["calibrated", "xkv by head", "uniform", "uniform, reconstruction"]
    assert list(dict.fromkeys(row["name"] for row in found["rows"])) == names


@pytest.mark.usefixtures("_small")
def test_plans_by_head_stand_beside_those_by_layer(tmp_path: Path) -> None:
    found = run(tmp_path, "--evictions", "append", "--by", "layer", "head", "--formats", "model", "int8")
    rows = {row["name"]: row for row in found["rows"] if (row["size"], row["kind"]) == ("60.0%", "documentation")}
    assert set(rows) == {"uniform", "calibrated", "joint", "calibrated by head", "joint by head", "all int8"}
    for name in ("calibrated", "joint"):
        assert rows[f"{name} by head"]["share"] == pytest.approx(rows[name]["share"], abs=0.01)
        by_head = xkv_fx.Calibration.load(
            tmp_path / f"calibration{'-formats' * (name == 'joint')}-by-head-append.safetensors"
        )
        assert by_head.heads == (2, 2)
    text = (tmp_path / "allocations.md").read_text()
    assert "| **calibrated by head against calibrated** | **" in text
    assert "| **joint by head against joint** | **" in text


def test_joint_plans_are_compared_with_the_single_format_that_is_best_in_that_column() -> None:
    kl = {"uniform": (0.4, 0.6), "calibrated": (0.2, 0.2), "joint": (0.01, 0.03)}
    small, large = (
        {"all int8": (0.1, 0.1), "all int4": (0.05, 0.05)},
        {"all int8": (0.04, 0.04), "all int4": (0.1, 0.1)},
    )
    lines = [
        Line("append", "documentation", size, name, {}, 0.25, 8.0, values, (1.0, 1.0))
        for size, single in (("6.0%", small), ("25.0%", large))
        for name, values in {**kl, **single}.items()
    ]
    text = as_tables(lines, "bfloat16")
    assert "| uniform | 0.500 (0.500, 0.590) | 0.500 (0.500, 0.590) |" in text
    assert "| **joint against capacities alone** | **-90%** [-95%, -85%] | **-90%** [-95%, -85%] |" in text
    expected = "**-60%** [-80%, -40%] all int4 | **-50%** [-75%, -25%] all int8 |"
    assert f"| **joint against the best single format** | {expected}" in text
    assert [nats(value) for value in (0.12345, 0.012345, 0.0012345)] == ["0.123", "0.0123", "0.00123"]
