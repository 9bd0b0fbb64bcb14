"""Mean keys: constants of a plan, from a calibration through their file into every graph."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from ready_models import model, remember_captures
from tiny_models import llama, random_ids

import xkv_fx
from xkv_fx import Budgets, Calibration, Policy
from xkv_fx.errors import BudgetError, FileFormatError, SessionError
from xkv_fx.mean_keys import MeanKey, of_part

RNG = np.random.default_rng(0)
MEANS = tuple(RNG.normal(0, 2, (2, 8)).astype(np.float32) for _ in range(2))
PLAN = Budgets((12, 17), Policy(), formats=(("int8", "int4"), ("int4", "int4")), mean_keys=MEANS)
WITHOUT = dataclasses.replace(PLAN, mean_keys=None)
OPTIONS: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}


@pytest.fixture(autouse=True)
def _captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_captures(monkeypatch)


def test_they_are_frozen_and_equal_by_their_numbers() -> None:
    assert PLAN.mean_keys is not None
    first, second = PLAN.mean_keys
    assert first == MeanKey(MEANS[0].copy())
    assert hash(first) == hash(MeanKey(MEANS[0].copy()))
    assert first != second
    assert first != MeanKey(MEANS[0].reshape(4, 4))
    assert (first.kv_heads, first.key_dim) == (2, 8)
    with pytest.raises(ValueError, match="read-only"):
        first.values[0, 0] = 1.0
    assert Budgets((12, 17), formats=PLAN.formats, mean_keys=[MEANS[0], second]) == PLAN
    assert hash(PLAN) == hash(dataclasses.replace(PLAN))
    assert PLAN != WITHOUT
    assert len({PLAN, WITHOUT, dataclasses.replace(PLAN, mean_keys=MEANS[::-1])}) == 3


@pytest.mark.parametrize("formats", [None, (None, None), (("model", "int4"), None)])
def test_a_plan_that_codes_no_keys_carries_none(formats: Any) -> None:
    assert Budgets((12, 17), formats=formats, mean_keys=MEANS).mean_keys is None


@pytest.mark.parametrize(
    ("mean_keys", "message"),
    [
        (MEANS[:1], "1 entries for 2 capacities"),
        ("none", "must be a sequence"),
        (MEANS[0], "must be a sequence"),
        ((MEANS[0], [[1.0]]), "layer 1: a mean key must be a numpy array"),
        ((MEANS[0][0], None), r"layer 0: .*float32 \[kv_heads, key_dim\]"),
        ((MEANS[0].astype(int), None), "layer 0: .*int64"),
        ((MEANS[0] * np.nan, None), "layer 0: .*finite"),
        ((MEANS[0] * np.float64(1e300), None), "layer 0: .*finite"),
        ((np.zeros((0, 8)), None), "layer 0: .*at least one"),
    ],
)
def test_what_is_no_mean_key_is_refused(mean_keys: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budgets((12, 17), formats=PLAN.formats, mean_keys=mean_keys)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 4), "2 KV heads of 4"), ((3, 8), "3 KV heads"), ((4, 8), "4 KV heads, but the layer has 2")],
)
def test_mean_keys_of_another_model_are_refused(shape: tuple[int, int], message: str) -> None:
    other = dataclasses.replace(PLAN, mean_keys=(MEANS[0], np.zeros(shape)))
    with pytest.raises(BudgetError, match=f"mean key of layer 1 is (of )?{message}"):
        xkv_fx.transform(model(), other, backend="eager")


def test_processes_that_share_a_model_take_their_own_heads() -> None:
    whole = MeanKey(np.arange(48, dtype=np.float32).reshape(6, 8))
    parts = [of_part(whole, 0, 2, part, 3) for part in range(3)]
    assert np.array_equal(np.concatenate([part.values for part in parts]), whole.values)
    assert of_part(whole, 0, 6, 1, 3) == whole
    with pytest.raises(BudgetError, match="6 KV heads, but the layer has 2 in each of 2 processes"):
        of_part(whole, 0, 2, 0, 2)


# Their file


def saved(folder: Path, plan: Budgets = PLAN) -> Path:
    plan.save(folder / "plan.json")
    return folder / "plan.json"


def test_they_lie_beside_the_plan(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plan.json", "plan.json.safetensors"]
    assert Budgets.load(path) == PLAN
    assert isinstance(Budgets.load(path), Budgets)
    data = json.loads(path.read_text())
    assert data["version"] == 3
    assert set(data["constants"]) == {"file", "sha256"}
    held = safetensors.numpy.load_file(tmp_path / "plan.json.safetensors")
    assert {name: array.shape for name, array in held.items()} == {"key_mean_0": (2, 8), "key_mean_1": (2, 8)}
    one = dataclasses.replace(PLAN, mean_keys=(None, MEANS[1]))
    assert Budgets.load(saved(tmp_path, one)) == one
    without = tmp_path / "without"
    without.mkdir()
    assert Budgets.load(saved(without, WITHOUT)) == WITHOUT
    assert json.loads((without / "plan.json").read_text())["version"] == 2
    assert [file.name for file in without.iterdir()] == ["plan.json"]


def changed_reference(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data["constants"] = {name: value for name, value in {**data["constants"], **changes}.items() if value is not None}
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "../plan.json.safetensors"}, "in the plan's own folder, not '../"),
        ({"file": "/etc/passwd.safetensors"}, "in the plan's own folder"),
        ({"file": "a\\b.safetensors"}, "in the plan's own folder"),
        ({"file": "plan.json"}, "must be a .safetensors file"),
        ({"file": ".safetensors"}, "constants are missing"),
        ({"file": "x" * 300 + ".safetensors"}, "in the plan's own folder"),
        ({"file": 3}, "wrong type"),
        ({"file": None}, "lacks 'file'"),
        ({"sha256": None}, "lacks 'sha256'"),
        ({"sha256": "00"}, "not the plan's constants"),
        ({"more": 1}, "unknown field 'more'"),
    ],
)
def test_a_wrong_reference_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = saved(tmp_path)
    changed_reference(path, **changes)
    with pytest.raises(FileFormatError, match=message) as caught:
        Budgets.load(path)
    assert str(path) in str(caught.value)


def test_a_plan_without_its_constants_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    constants = tmp_path / "plan.json.safetensors"
    whole = constants.read_bytes()
    for content in (whole[:-1], whole + b"\0", whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        constants.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"plan\.json\.safetensors: .*not the plan's constants"):
            Budgets.load(path)
    constants.unlink()
    with pytest.raises(FileFormatError, match="constants are missing; keep this file beside the plan"):
        Budgets.load(path)
    with pytest.raises(FileFormatError, match="in a file of their own"):
        Budgets.from_dict(PLAN.to_dict())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"key_mean_2": MEANS[0]}, "holds 'key_mean_2', which is no mean key of 2 layers"),
        ({"key_mean_00": MEANS[0]}, "which is no mean key"),
        ({"key_mean_0": MEANS[0].astype(np.float64)}, "F64 instead of float32"),
        ({"key_mean_0": MEANS[0][0]}, "layer 0: a mean key must be"),
        ({"key_mean_0": MEANS[0] * np.inf}, "layer 0: .*finite"),
    ],
)
def test_constants_of_something_else_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = saved(tmp_path)
    constants = tmp_path / "plan.json.safetensors"
    safetensors.numpy.save_file(arrays, constants)
    with pytest.raises(FileFormatError, match="not the plan's constants"):
        Budgets.load(path)
    from xkv_fx.engines.records import FileRecord

    changed_reference(path, sha256=FileRecord.of(constants).sha256)
    with pytest.raises(FileFormatError, match=message):
        Budgets.load(path)


# Every road


def test_calibrate_solve_save_load_transform(tmp_path: Path) -> None:
    source, prompts = model(), [random_ids(1, length, seed=length)[0] for length in (40, 31)]
    calibration = xkv_fx.calibrate(
        source, prompts, grid=(0.25, 0.5), continuation=6, formats=("int8", "int4"), resume=tmp_path / "parts"
    )
    assert calibration.mean_keys is not None
    keys: list[list[torch.Tensor]] = [[], []]
    for ids in prompts:
        cache = source(ids[None]).past_key_values
        for layer, of_layer in enumerate(keys):
            of_layer.append(cache.layers[layer].keys[0].detach())
    for mean, of_layer in zip(calibration.mean_keys, keys, strict=True):
        expected = torch.cat(of_layer, 1).mean(1)
        torch.testing.assert_close(torch.tensor(mean and mean.values), expected, rtol=1e-5, atol=1e-6)
    calibration.save(tmp_path / "calibration")
    assert Calibration.load(tmp_path / "calibration") == calibration
    assert Calibration.load(tmp_path / "calibration").mean_keys == calibration.mean_keys
    assert dataclasses.replace(calibration, mean_keys=None).digest() != calibration.digest()
    budgets = xkv_fx.solve(calibration, fraction=0.3, multiple=1)
    assert budgets.mean_keys == calibration.mean_keys
    again = Budgets.load(saved(tmp_path, budgets))
    ids = random_ids(1, 30)
    outputs = [xkv_fx.transform(source, plan, backend="eager").generate(ids, **OPTIONS) for plan in (budgets, again)]
    assert torch.equal(*outputs)
    report = xkv_fx.verify(source, again, prompts, continuation=6)
    assert report.stored_in(again).mean_keys == budgets.mean_keys
    assert report.single is not None
    assert report.single_format_plan(again).mean_keys == budgets.mean_keys


def test_full_budgets_are_near_the_model_though_its_keys_lie_far_from_0() -> None:
    """Keys that a bias moves far away in the channels that positions hardly turn: four bits hardly tell one from
    another."""
    source = llama(2, attention_bias=True)
    with torch.no_grad():
        for layer in source.model.layers:
            layer.self_attn.k_proj.bias.view(2, 8)[:, [3, 7]] += 20.0
    prompts = [random_ids(1, 60, seed=seed)[0] for seed in range(2)]
    calibration = xkv_fx.calibrate(source, prompts, grid=(0.25, 0.5), continuation=6, formats=("int8", "int4"))
    full = Budgets((64, 64), Policy(eviction="none"), formats=(("int4", "int8"),) * 2)
    with_means = dataclasses.replace(full, mean_keys=calibration.mean_keys)
    ids = random_ids(1, 40, seed=9)
    with torch.no_grad():
        expected = source(ids).logits[:, 30:]
    strayed = []
    for plan in (full, with_means):
        llm = xkv_fx.transform(source, plan, backend="eager")
        session = llm.new_session()
        llm(ids[:, :30], past_key_values=session)
        got = torch.cat([session.step(ids[:, at : at + 1], None) for at in range(30, 40)], 1)
        strayed.append(float((got - expected).abs().mean()))
    assert strayed[1] < strayed[0] / 2


def test_sessions_of_other_mean_keys_are_refused(tmp_path: Path) -> None:
    llm = xkv_fx.transform(model(), PLAN, backend="eager")
    session = llm.new_session()
    llm(random_ids(1, 20), past_key_values=session)
    session.save(tmp_path / "session")
    llm.with_budgets(dataclasses.replace(PLAN)).new_session().load(tmp_path / "session")
    for other in (WITHOUT, dataclasses.replace(PLAN, mean_keys=MEANS[::-1])):
        with pytest.raises(SessionError, match="of another model, other budgets"):
            llm.with_budgets(other).new_session().load(tmp_path / "session")


def test_plans_by_head_are_told_how_many_caches_have_mean_keys() -> None:
    split = dataclasses.replace(PLAN, capacities=((9, 13), 12))
    assert "mean keys     of 3 caches" in xkv_fx.transform(model(), split, backend="eager").describe()


def test_a_layer_in_the_models_dtype_is_left_as_it_is() -> None:
    mixed = dataclasses.replace(PLAN, formats=(None, ("int8", "int8")))
    llm = xkv_fx.transform(model(), mixed, backend="eager")
    assert "mean keys     of 1 layers" in llm.describe()
    assert not hasattr(llm.decode, "key_mean_0")
    assert hasattr(llm.decode, "key_mean_1")
