"""The bench: what it measures, what compares it, and what it refuses. Nothing here depends on how fast anything is."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exhaustive import exhaustive
from old_versions import needs_fp8
from ready_models import transformed
from tiny_models import llama
from typer.testing import CliRunner

from xkv_fx import Budgets, Policy
from xkv_fx.cli import app
from xkv_fx.errors import BackendError, BudgetError
from xkv_fx.evaluation import machine
from xkv_fx.evaluation.quality.quantized import QUANTIZED
from xkv_fx.evaluation.speed import bench, bench_command
from xkv_fx.evaluation.speed.bench import BenchSettings, run_bench
from xkv_fx.evaluation.speed.bench_result import Bench, Run
from xkv_fx.evaluation.speed.contestants import Ours, dynamic, sliding, static
from xkv_fx.evaluation.speed.peers import run_peer
from xkv_fx.evaluation.speed.weights import weight_bytes, with_int8_weights

IN_TURNS = ("dynamic", "sliding", "ours-full", "ours", "ours-int8", "ours-plain", "ours-equal-bytes")
SETTINGS = BenchSettings(
    context=64,
    rows=2,
    budgets=Budgets.uniform(2, 24),
    rounds=2,
    new_tokens=2,
    backend="eager",
    only=(*IN_TURNS, "kvpress"),
)


@pytest.fixture(scope="module")
def measured() -> Bench:
    return run_bench(llama(2), SETTINGS)


def test_everybody_is_measured_in_one_run(measured: Bench) -> None:
    runs = {run.name: run for run in measured.runs}
    assert tuple(runs) == SETTINGS.only
    for name in IN_TURNS:
        run = runs[name]
        assert run.decode_p50_ms is not None
        assert run.decode_p90_ms is not None
        assert run.tokens_per_second is not None
        assert run.floor_ms is not None
        assert 0 < run.decode_p50_ms <= run.decode_p90_ms
        assert run.tokens_per_second == pytest.approx(run.rows / run.decode_p50_ms * 1e3)
        assert run.floor_ms > 0
    assert "not installed" in (runs["kvpress"].skipped or "")


def test_bytes_are_those_that_are_held(measured: Bench) -> None:
    runs = {run.name: run for run in measured.runs}
    slot = 2 * 2 * 8 * 4 * 2 * 2  # K and V, heads, dimensions, bytes, layers, rows
    seen = 64 + SETTINGS.steps
    assert runs["dynamic"].kv_bytes == slot * seen
    assert runs["sliding"].kv_bytes == slot * 23  # transformers' window counts the token to come
    assert runs["ours"].kv_bytes == runs["ours-plain"].kv_bytes == slot * 24
    assert runs["ours-full"].kv_bytes == slot * seen
    equal = runs["ours-equal-bytes"]
    assert equal.rows == 2 * seen // 24
    assert equal.kv_bytes is not None
    assert slot * (seen - 24) < equal.kv_bytes <= slot * seen
    for run in runs.values():
        model = with_int8_weights(llama(2)) if run.name == "ours-int8" else llama(2)
        assert run.peak_bytes is None or run.peak_bytes > (run.kv_bytes or 0) + weight_bytes(model)


def test_int8_weights_are_a_copy_that_counts_its_own_bytes() -> None:
    model = llama(2)
    before = model(torch.arange(9)[None]).logits
    whole = with_int8_weights(model)
    assert torch.equal(model(torch.arange(9)[None]).logits, before)
    linear = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    least = weight_bytes(model) - sum(3 * weight.numel() for weight in linear)
    assert least < weight_bytes(whole) <= least + sum(8 * weight.shape[0] for weight in linear)  # scales and the like
    step = float(model.lm_head.weight.abs().max()) / 127
    torch.testing.assert_close(whole.lm_head.weight.dequantize(), model.lm_head.weight, atol=step, rtol=0)


def test_ratios_come_from_the_run_itself(measured: Bench) -> None:
    runs = {run.name: run for run in measured.runs}
    found = measured.to_dict()
    assert set(found) == {"runs", "ratios", "machine"}
    ratios = found["ratios"]
    for name in IN_TURNS:
        run, base = runs[name], runs["dynamic"]
        assert ratios["tokens_per_second_to_dynamic"][name] == run.tokens_per_second / base.tokens_per_second  # type: ignore[operator]
        assert ratios["step_to_floor"][name] == run.decode_p50_ms / run.floor_ms  # type: ignore[operator]
    assert ratios["budgets_to_plain"] == {"ours-plain": runs["ours"].decode_p50_ms / runs["ours-plain"].decode_p50_ms}  # type: ignore[operator]
    for name, weights in {
        "ours": weight_bytes(llama(2)),
        "ours-int8": weight_bytes(with_int8_weights(llama(2))),
    }.items():
        floor = (weights + runs[name].kv_bytes) / found["machine"]["read_bytes_per_second"]  # type: ignore[operator]
        assert runs[name].floor_ms == pytest.approx(floor * 1e3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_all_tokens_kept_in_fewer_bits_beside_our_full_cache() -> None:
    pairs = (("int8", "int4"), ("int4", "int4"))
    names = ("ours-all-int8/int4", "ours-all-int4", "ours-all-int4-equal-bytes")
    settings = dataclasses.replace(SETTINGS, formats=pairs, only=("ours-full", *names), prefill=False)
    found = run_bench(llama(2), settings)
    runs = {run.name: run for run in found.runs}
    assert set(runs) == {"ours-full", *names}
    seen = 64 + SETTINGS.steps
    heads = 2 * 2 * 2 * seen  # layers, heads, rows, tokens
    assert runs["ours-full"].kv_bytes == heads * (8 + 8) * 4
    assert runs["ours-all-int8/int4"].kv_bytes == heads * ((8 + 4) + (4 + 4))
    assert runs["ours-all-int4"].kv_bytes == heads * 2 * (4 + 4)
    equal = runs["ours-all-int4-equal-bytes"]
    assert (equal.rows, equal.kv_bytes) == (2 * 4, runs["ours-full"].kv_bytes)
    assert all(run.filled for run in found.runs)
    full = runs["ours-full"]
    ratios = found.ratios["tokens_per_second_to_ours_full"]
    assert ratios == {name: runs[name].tokens_per_second / full.tokens_per_second for name in names}  # type: ignore[operator]
    step = runs["ours-all-int4"].decode_p50_ms / full.decode_p50_ms  # type: ignore[operator]
    notes = found.notes()
    assert any(note.startswith("ours-all-int4, 2 rows,") and f"takes {step:.2f} times its" in note for note in notes)
    assert any(
        note.startswith("ours-all-int4-equal-bytes, 8 rows,") and note.endswith("our full cache of 2 rows")
        for note in notes
    )
    with pytest.raises(BackendError, match="unknown contestants: ours-all-int8; choose from"):
        run_bench(llama(2), dataclasses.replace(settings, only=("ours-all-int8",)))


def test_filled_codes_are_numbers_in_every_format() -> None:
    entry = Ours("ours", llama(2), transformed(Budgets((12, 20), formats=(("fp8", "int8"), ("int4", "fp8")))))
    entry.fill(40)
    assert all(int(entry.session.session.state[f"{part}_{layer}"].max()) > 100 for layer in range(2) for part in "kv")
    assert torch.isfinite(entry.session.step(entry._ids, None)).all()


def test_prompts_and_filled_caches_are_told_apart(measured: Bench) -> None:
    runs = {run.name: run for run in measured.runs}
    assert not runs["ours"].filled
    assert runs["ours"].prefill_s is not None
    assert runs["ours-equal-bytes"].filled
    assert any(note.startswith("filled") for note in measured.notes())
    assert not dataclasses.replace(SETTINGS, context=8192).feeds_prompts
    assert dataclasses.replace(SETTINGS, context=8192, prefill=True).feeds_prompts


def test_a_picture_and_a_table(measured: Bench, tmp_path: Path) -> None:
    measured.draw(tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert measured.table().row_count == len(SETTINGS.only)


@exhaustive
def test_a_static_cache_of_our_capacity_is_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    uneven = dataclasses.replace(SETTINGS, only=("ours", "static-plain"), budgets=Budgets((24, 32)))
    found = run_bench(llama(2), uneven)
    ours, plain = found.runs[1], found.runs[0]
    slot = 2 * 2 * 8 * 4 * 2  # K and V, heads, dimensions, bytes, rows
    assert (plain.name, plain.kv_bytes, ours.kv_bytes) == ("static-plain", slot * 64, slot * 56)
    assert plain.filled
    ratio = found.ratios["budgets_to_plain"]["static-plain"]
    assert ratio == ours.decode_p50_ms / plain.decode_p50_ms  # type: ignore[operator]
    assert any("static-plain" in note for note in found.notes())


def test_nothing_is_compared_with_what_was_not_measured() -> None:
    alone = Bench((Run("ours", 1, 8, decode_p50_ms=2.0, floor_ms=1.0, tokens_per_second=500.0),), {})
    assert alone.ratios == {"tokens_per_second_to_dynamic": {}, "step_to_floor": {"ours": 2.0}}


def test_filled_sessions_count_as_if_a_prompt_had_been_fed() -> None:
    import xkv_fx

    llm = xkv_fx.transform(llama(2), Budgets((12, 20)), backend="eager", check=False)
    filled, fed = Ours("ours", llama(2), llm), Ours("ours", llama(2), llm)
    filled.fill(40)
    fed.prefill(torch.arange(40)[None] + 3)
    for entry in (filled, fed):
        entry.step()
    assert filled.session.tokens_seen.tolist() == fed.session.tokens_seen.tolist() == [41]
    assert filled.session.get_seq_length() == fed.session.get_seq_length() == 41
    assert filled.session.session._steps_left == fed.session.session._steps_left
    assert filled.session.session.state["k_0"].std() > 0.5


def test_transformers_caches_decode_what_generate_does() -> None:
    model, ids = llama(2), torch.arange(20)[None] + 3
    expected = model.generate(ids, do_sample=False, max_new_tokens=4)[:, 20:]
    for contestant in (dynamic(model, 1), sliding(model, 1, 64), static(model, 1, 32)):
        contestant._decode = model  # uncompiled
        contestant.prefill(ids)
        tokens = [contestant._ids]
        for _ in range(3):
            contestant.step()
            tokens.append(contestant._ids)
        assert torch.equal(torch.cat(tokens, 1), expected), contestant.name


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"only": ("dynamic", "nobody")}, BackendError, "unknown contestants: nobody"),
        ({"rows": 0}, BudgetError, "rows must be at least 1"),
        ({"context": 399}, BudgetError, "more than the model's 400 positions"),
        ({"budgets": Budgets((8, 8))}, BudgetError, "do not fit into the 8 slots"),
        ({"budgets": Budgets((24, 24), Policy(eviction="append"))}, BudgetError, "decodes past the budgets"),
    ],
)
def test_what_cannot_be_measured_is_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_bench(llama(2), dataclasses.replace(SETTINGS, **changed))


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match=r"1000000000 rows of 64 tokens do not fit: .* lower --batch"):
        run_bench(llama(2), dataclasses.replace(SETTINGS, rows=10**9))
    monkeypatch.setattr(bench, "available_bytes", lambda device: 1000)
    with pytest.raises(BudgetError, match="and 1,000 are free"):
        run_bench(llama(2), SETTINGS)


def test_other_engines_are_run_by_their_own_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def peer(python: str) -> Run:
        return run_peer("kvpress", python, SETTINGS.asked_of_peers(torch.float32))

    assert (peer(str(tmp_path / "nowhere")).skipped or "").startswith("not run")
    assert "No module named 'kvpress'" in (peer(sys.executable).skipped or "")
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\necho loading\n" + """echo '{"rows": 2, "prefill_s": 1, "steps_s": [0.1, 0.3, 0.2]}'\n"""
    )
    script.chmod(0o755)
    run = peer(str(script))
    assert (run.decode_p50_ms, run.tokens_per_second, run.kv_bytes) == (pytest.approx(200), pytest.approx(10), None)
    script.write_text("#!/bin/sh\necho done\n")
    assert "could not be read" in (peer(str(script)).skipped or "")


@needs_fp8
def test_quantized_caches_take_part_where_they_are_installed() -> None:
    settings = dataclasses.replace(SETTINGS, only=("fp8", "int4"))
    fp8, int4 = run_bench(llama(2), settings).runs
    assert fp8.tokens_per_second is not None
    assert fp8.kv_bytes is not None
    assert 0 < fp8.kv_bytes < 2 * 2 * 8 * 4 * 2 * 2 * 64
    if not QUANTIZED["int4"].installed:
        assert int4.skipped == "not installed; pip install hqq"


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_command, "locate", lambda name: (tmp_path, None))
    monkeypatch.setattr("xkv_fx.hf.models.load_model", lambda name, dtype: (llama(1).to(dtype), None))
    out = tmp_path / "bench.json"
    options = ["bench", "--context", "30", "--rounds", "1", "--new-tokens", "1", "--formats", "int8/int4"]
    options += ["--only", "dynamic,openvino"]
    result = CliRunner().invoke(app, [*options, "--dtype", "bfloat16", "--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert [run["name"] for run in written["runs"]] == ["dynamic", "openvino"]
    assert json.loads(result.stdout.strip().splitlines()[-1]) == written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "unknown dtype"),
        (["--device", "tpu"], "unknown device"),
        (["--fraction", "1.5"], "fraction must be"),
        (["--fraction", "nan"], "fraction must be"),
    ],
)
def test_options_out_of_range(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *options])
    assert isinstance(result.exception, BackendError | BudgetError)
    assert message in str(result.exception)


def test_an_unknown_option_is_an_error() -> None:
    assert CliRunner().invoke(app, ["bench", "--frobnicate"]).exit_code == 2


def test_the_machine_is_described_without_naming_it() -> None:
    found = machine.describe_machine(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert not any(math.isnan(value) for value in found.values() if isinstance(value, float))
    assert set(SETTINGS.known) >= set(IN_TURNS)
