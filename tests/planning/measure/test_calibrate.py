"""Calibrating: what is measured, what is refused, and going on after an interruption."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ready_models import captured, model, remember_captures
from tiny_models import POSITIONS, Snapshot, build, llama, random_ids
from transformers import BloomConfig, BloomForCausalLM

import xkv_fx
from xkv_fx import Budgets, Calibration, Policy
from xkv_fx.errors import BudgetError, PromptError, UnsupportedModelError
from xkv_fx.formats import LayerFormats
from xkv_fx.hf.capture import capture
from xkv_fx.hf.inspect import fingerprint
from xkv_fx.planning.measure.calibrate import cut_checked, measure_calibration
from xkv_fx.planning.measure.continuation import FULL, cut_model, layer_plans, run_full, storing_as
from xkv_fx.planning.measure.partial_results import remove_parts
from xkv_fx.planning.measure.points import GRID
from xkv_fx.runtime.scorers import SnapKV

PROMPTS = [random_ids(1, length, seed=length)[0] for length in (40, 31)]
PROMPTS_ROWS = [ids[None] for ids in PROMPTS]
NEW_TOKENS = 6
SHARES = (0.25, 0.5)
APPEND = Policy(eviction="append")


@pytest.fixture(autouse=True)
def _captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_captures(monkeypatch)


def calibrate(**options: Any) -> Calibration:
    settings: dict[str, Any] = {"grid": SHARES, "policy": APPEND, "continuation": NEW_TOKENS, **options}
    return xkv_fx.calibrate(model(), settings.pop("prompts", PROMPTS), **settings)


def test_each_layer_is_cut_alone() -> None:
    calibration = calibrate()
    layers = captured("llama", 2, 1).layers
    for prompt, ids in enumerate(PROMPTS):
        full = run_full(cut_model(captured("llama", 2, 1)), SnapKV(), ids[None], NEW_TOKENS)
        for layer in range(2):
            for place, share in enumerate(SHARES):
                capacity = round(share * (len(ids) - NEW_TOKENS))
                cut = layer_plans(Budgets((capacity,) * 2, APPEND), layers, NEW_TOKENS)
                plan = [cut[layer] if other == layer else FULL for other in range(2)]
                expected = float(full.divergence([plan]).mean())
                assert calibration.kl[prompt, layer, place] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_it_says_what_it_was_made_for() -> None:
    calibration = calibrate()
    assert calibration.lengths == (34, 25)
    assert calibration.policy == APPEND
    assert calibration.grid == SHARES
    assert calibration.model == fingerprint(model())
    assert calibrate(grid=None, prompts=PROMPTS[:1]).grid == GRID


def test_each_layer_is_stored_in_fewer_bits_alone() -> None:
    calibration = calibrate(formats=("model", "int8", "int4"))
    pairs: list[LayerFormats | None] = [None, ("int8", "int8"), ("int8", "int4"), ("int4", "int4")]
    assert calibration.formats == (*[None] * 2, *(pair for pair in pairs[1:] for _ in range(3)))
    assert calibration.grid == (*SHARES, *(0.25, 0.5, 1.0) * 3)
    np.testing.assert_allclose(calibration.kl[:, :, :2], calibrate().kl, rtol=1e-3, atol=1e-7)
    layers, ids = captured("llama", 2, 1).layers, PROMPTS[0]
    full = run_full(cut_model(captured("llama", 2, 1)), SnapKV(), ids[None], NEW_TOKENS)
    (_, (slots, _)) = layer_plans(Budgets((17, 17), APPEND), layers, NEW_TOKENS)
    assert calibration.mean_keys is not None
    for at, pair in enumerate(pairs[1:]):
        storing = storing_as(layers[1], pair, calibration.mean_keys[1])
        expected = full.divergence([(FULL, (slots, storing)), (FULL, (None, storing))]).mean(1)
        np.testing.assert_allclose(calibration.kl[0, 1, [3 + 3 * at, 4 + 3 * at]], expected, rtol=1e-3, atol=1e-7)


def test_the_models_dtype_named_is_as_if_nothing_was() -> None:
    named, plain = calibrate(formats=("model",)), calibrate()
    assert named == plain
    assert named.digest() == plain.digest()
    assert named.formats is None


def test_partial_results_of_other_formats_are_not_taken(tmp_path: Path) -> None:
    first = calibrate(resume=tmp_path, formats=("int8",))
    assert calibrate(resume=tmp_path, formats=("int4",)) != first
    assert calibrate(resume=tmp_path, formats=("int8",)) == first
    assert len(list(tmp_path.iterdir())) == 2 + 4, "sums of keys serve all formats"


def test_the_model_is_left_alone() -> None:
    snapshot = Snapshot.of(model())
    calibrate()
    snapshot.assert_unchanged()


def test_the_eviction_that_will_serve_is_measured() -> None:
    assert calibrate(policy=Policy(eviction="ring")) != calibrate()


def test_an_interrupted_calibration_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(progress=stop, resume=tmp_path)
    (kept,) = tmp_path.iterdir()
    whole = calibrate()
    runs = []
    measure = xkv_fx.planning.measure.calibrate.run_full  # type: ignore[attr-defined]

    def counted(cut: Any, scorer: Any, ids: torch.Tensor, continuation: int) -> Any:
        runs.append(ids.shape[1])
        return measure(cut, scorer, ids, continuation)

    monkeypatch.setattr("xkv_fx.planning.measure.calibrate.run_full", counted)
    assert calibrate(resume=tmp_path) == whole
    assert len(PROMPTS[0]) not in runs, "the first prompt was not measured again"
    assert len(PROMPTS[1]) in runs

    content = bytearray(kept.read_bytes())
    content[-1] ^= 1  # a sign or an exponent: still a number
    for damaged in (b"damaged", bytes(content)):
        kept.write_bytes(damaged)
        assert calibrate(resume=tmp_path) == whole
    runs.clear()
    assert calibrate(resume=tmp_path, grid=(0.3, 0.6)) != whole
    assert len(PROMPTS[0]) in runs, "what was measured on another grid is not taken"


def test_partial_results_of_other_weights_are_not_taken(tmp_path: Path) -> None:
    first = calibrate(resume=tmp_path)
    other = captured_of(llama(2, seed=5))
    again = measure_calibration(other, PROMPTS_ROWS, APPEND, SHARES, NEW_TOKENS, resume=tmp_path)
    assert again != first
    assert again == measure_calibration(other, PROMPTS_ROWS, APPEND, SHARES, NEW_TOKENS)


def captured_of(source: Any) -> Any:
    return capture(source, check=False, decode=False)


def test_progress_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    calibrate(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": []}, PromptError, "at least one"),
        ({"prompts": [PROMPTS[0][:7]]}, PromptError, "which leaves too few"),
        ({"prompts": [torch.zeros(POSITIONS + 1, dtype=torch.int64)]}, PromptError, "positions; cut it"),
        ({"prompts": [torch.full((20,), 9999)]}, PromptError, "has the token 9999"),
        ({"policy": Policy(eviction="none")}, BudgetError, "never evicts"),
        ({"policy": "ring"}, BudgetError, "policy must be"),
        ({"policy": Policy(scorer="guess")}, BudgetError, "unknown scorer"),
        ({"continuation": 0}, BudgetError, "continuation must be"),
        ({"grid": (0.5,)}, BudgetError, "at least two ascending shares"),
        ({"grid": (0.5, 0.4)}, BudgetError, "ascending"),
        ({"grid": (0.5, 1.0)}, BudgetError, "below 1"),
        ({"grid": (float("nan"), 0.5)}, BudgetError, "ascending"),
        ({"grid": "half"}, BudgetError, "grid must be shares"),
        ({"formats": "int8"}, BudgetError, "formats must be a sequence"),
        ({"formats": ("int8", "fp4")}, BudgetError, "unknown format 'fp4'"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibrate(**options)


def test_a_model_whose_tokens_meet_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = captured("llama", 2, 1)
    graph = cut_model(source)
    last = graph.segments[-1]
    mixing = torch.nn.Module()
    mixing.forward = lambda *inputs: tuple(part + part.mean(1, keepdim=True) for part in last.module(*inputs))
    mixed = dataclasses.replace(graph, segments=(*graph.segments[:-1], dataclasses.replace(last, module=mixing)))  # type: ignore[arg-type]
    monkeypatch.setattr("xkv_fx.planning.measure.calibrate.cut_model", lambda captured, scorer: mixed)
    with pytest.raises(UnsupportedModelError, match="tokens meet outside attention"):
        cut_checked(source, SnapKV(), PROMPTS[0][None], NEW_TOKENS)


def test_infinite_output_is_refused() -> None:
    source = llama(2)
    with torch.no_grad():
        source.lm_head.weight.mul_(float("inf"))
    with pytest.raises((PromptError, UnsupportedModelError)):
        measure_calibration(captured_of(source), PROMPTS_ROWS, APPEND, SHARES, NEW_TOKENS)


def test_kl_is_float32_and_not_negative() -> None:
    calibration = calibrate()
    assert calibration.kl.dtype == np.float32
    assert (calibration.kl >= 0).all()


def test_only_what_calibrating_kept_is_deleted(tmp_path: Path) -> None:
    ours, others = tmp_path / f"{'0a' * 32}.safetensors", tmp_path / "weights.safetensors"
    ours.touch()
    others.touch()
    remove_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
    others.unlink()
    ours.touch()
    remove_parts(tmp_path)
    assert not tmp_path.exists()


def test_attention_with_slopes_is_refused() -> None:
    config = BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(UnsupportedModelError, match="takes slopes, which cannot be cut out"):
        xkv_fx.calibrate(build(BloomForCausalLM, config), [random_ids(1, 60)])
