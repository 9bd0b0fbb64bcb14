"""A calibration's data: what is refused, its curves, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import xkv_fx
from xkv_fx import Budgets, Calibration, LayerSpec, Policy
from xkv_fx.errors import BudgetError, FileFormatError
from xkv_fx.fields import HEADER
from xkv_fx.planning.data.hull import gain_curve
from xkv_fx.planning.data.load_measured import load_measured
from xkv_fx.planning.data.profile_data import Profile

FILES = Path(__file__).parents[2] / "files_of_0_1"
GRID = (0.125, 0.25, 0.5)
SPEC = LayerSpec(4, 2, 8, 8, 4)
SLIDING = LayerSpec(4, 2, 8, 8, 4, sliding_window=16)
KL = np.array([[[0.8, 0.4, 0.1], [0.02, 0.01, 0.0]], [[0.6, 0.2, 0.1], [0.04, 0.01, 0.0]]], dtype=np.float32)


def made(**options: Any) -> Calibration:
    fields: dict[str, Any] = {
        "kl": KL, "grid": GRID, "lengths": (64, 48), "continuation": 4, "policy": Policy(eviction="append"),
        "layers": (SPEC, SPEC), "model": "some model",
    }  # fmt: skip
    return Calibration(**{**fields, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": KL[:, :1]}, r"\[prompts, layers, grid\] = \[2, 2, 3\]"),
        ({"kl": KL.astype(np.int64)}, "must be float32"),
        ({"kl": -KL}, "prompt 0 hold NaN, an infinity or a negative value"),
        ({"kl": np.where(KL[1, 0, 0] == KL, np.nan, KL)}, "prompt 1 hold NaN"),
        ({"grid": (0.5, 0.25, 0.75)}, "ascending"),
        ({"lengths": (64,)}, "prompts, layers, grid"),
        ({"lengths": (64, 0)}, "at least 1"),
        ({"continuation": 0}, "continuation"),
        ({"policy": None}, "policy must be"),
        ({"layers": ()}, "layers must be"),
        ({"model": ""}, "fingerprint"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        made(**options)


def test_curves_are_those_of_the_mean_over_prompts() -> None:
    curves = made().mean_curve(80)
    for curve, kl in zip(curves, KL.mean(0, dtype=np.float64), strict=True):
        np.testing.assert_allclose(curve, gain_curve(np.array(GRID), kl, 80))


def test_a_sliding_layer_gains_nothing_beyond_its_window() -> None:
    curve = made(layers=(SPEC, SLIDING)).mean_curve(80)[1]
    assert (curve[16:] == curve[16]).all()
    assert curve[4] < curve[16]


def test_expected_kl_adds_up_what_was_measured() -> None:
    assert made().expected_kl((16, 16)) == pytest.approx(0.3 + 0.01, rel=1e-5)
    assert made().expected_kl((64, 1000)) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(BudgetError, match="3 capacities"):
        made().expected_kl((1, 2, 3))
    with pytest.raises(BudgetError, match="at least 1"):
        made().expected_kl((1, 0))


def test_solve_takes_it_by_default_with_its_own_allocator() -> None:
    budgets = xkv_fx.solve(made(), fraction=0.25, multiple=1)
    assert budgets.total_tokens == 32
    assert budgets.capacities[0] > budgets.capacities[1] >= 4, "no layer is below a quarter of the mean"
    assert budgets.policy == made().policy
    provenance = budgets.provenance
    assert (provenance.allocator, provenance.context, provenance.model) == ("calibrated", 64, "some model")
    assert provenance.expected_retention is None
    assert provenance.expected_kl == pytest.approx(made().expected_kl(budgets.capacities))
    assert provenance.source == made().digest()


# Formats

INT8, INT4 = ("int8", "int8"), ("int4", "int4")
OF_FORMATS: dict[str, Any] = {
    "grid": (0.5, 0.75, 0.25, 0.5, 1.0, 0.125, 0.5, 1.0),
    "formats": (None, None, INT8, INT8, INT8, INT4, INT4, INT4),
    "kl": np.array([[[0.4, 0.1, 0.9, 0.41, 0.001, 2.0, 0.45, 0.05]], [[0.2, 0.1, 0.5, 0.21, 0.003, 2.2, 0.45, 0.05]]],
                   dtype=np.float32).repeat(2, 1),
}  # fmt: skip


def test_each_pair_of_formats_has_its_curve() -> None:
    calibration = made(**OF_FORMATS)
    assert calibration.pairs == (None, INT8, INT4)
    curves = calibration.kl_curves(80)
    assert curves.shape == (3, 2, 81)
    np.testing.assert_allclose(curves[0, 0, [40, 60, 80]], [0.3, 0.1, 0.0], rtol=1e-6)
    np.testing.assert_allclose(curves[1, 0, [20, 40, 80]], [0.7, 0.31, 0.002], rtol=1e-6)
    np.testing.assert_allclose(curves[2, 1, [10, 40, 80]], [2.1, 0.45, 0.05], rtol=1e-6)
    assert (np.diff(curves) <= 0).all()
    assert calibration.least_shares().tolist() == [0.5, 0.25, 0.125]
    assert calibration.expected_kl((40, 80), 80, (None, INT4)) == pytest.approx(0.3 + 0.05, rel=1e-6)
    assert calibration.expected_kl((60, 80), 80) == pytest.approx(0.1, rel=1e-6)


def test_more_tokens_that_seem_worse_are_taken_for_chance() -> None:
    kl = np.array([[[0.4, 0.02, 0.03]]], dtype=np.float32)
    curve = made(kl=kl, lengths=(64,), layers=(SPEC,), grid=(0.25, 0.5, 1.0), formats=(INT8,) * 3).kl_curves(64)[0, 0]
    assert curve[32:].tolist() == pytest.approx([0.02] * 33)


def test_a_sliding_layer_strays_no_less_beyond_its_window() -> None:
    curve = made(**OF_FORMATS, layers=(SPEC, SLIDING)).kl_curves(80)[1, 1]
    assert (curve[16:] == curve[16]).all()
    assert curve[8] == pytest.approx(0.31)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": (INT8,) * 7}, "formats must be 8 pairs, one for each point of the grid"),
        ({"formats": "int8int8"}, "formats must be 8 pairs"),
        ({"formats": (None, None, *("int8",) * 6)}, "the formats of point 2 must be None or a pair"),
        ({"formats": (None,) * 8}, "ascending"),
        ({"formats": (None, None, INT8, INT8, INT4, INT4, INT4, INT4)}, "the last point in int8 must be 1, all tokens"),
        ({"grid": (0.5, 0.75, 0.5, 0.25, 1.0, 0.125, 0.5, 1.0)}, "ascending"),
        ({"grid": (0.5, 1.0, 0.25, 0.5, 1.0, 0.125, 0.5, 1.0)}, "below 1"),
        ({"layers": (SPEC, LayerSpec(4, 2, 8, 20, 4))}, "layer 1 cannot be stored as int8: no group"),
        ({"layers": (LayerSpec(4, 1, 20, 0, 4),) * 2}, "layer 0 cannot be stored as int8: no group"),
    ],
)
def test_what_cannot_have_been_measured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        made(**{**OF_FORMATS, **options})


def test_what_was_not_measured_is_not_expected() -> None:
    with pytest.raises(
        BudgetError, match="int8/int4 was not measured; the formats of this calibration are model, int8"
    ):
        made(**OF_FORMATS).expected_kl((4, 4), formats=(None, ("int8", "int4")))
    with pytest.raises(BudgetError, match="formats of 1 layers were given"):
        made(**OF_FORMATS).expected_kl((4, 4), formats=(None,))
    with pytest.raises(BudgetError, match="kl_curves gives"):
        made(**OF_FORMATS).mean_curve(80)


def test_only_a_calibration_with_formats_is_of_version_2(tmp_path: Path) -> None:
    """What 0.1 could say is written as it wrote it."""
    for calibration, version in ((made(), 1), (made(**OF_FORMATS), 2)):
        calibration.save(tmp_path / "c.safetensors")
        with safetensors.safe_open(tmp_path / "c.safetensors", framework="np") as file:
            header = json.loads(file.metadata()[HEADER])
        assert header["version"] == version
        assert ("formats" in header) == (version == 2)
        loaded = Calibration.load(tmp_path / "c.safetensors")
        assert loaded == load_measured(tmp_path / "c.safetensors") == calibration
        assert (loaded.formats, loaded.grid) == (calibration.formats, calibration.grid)
    again = Calibration.load(FILES / "calibration.safetensors")
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (FILES / "calibration.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "unknown field 'formats'"),
        ({"formats": None}, "'formats' has the wrong type: None"),
        ({"formats": [None] * 8}, "ascending"),
        ({"formats": [["int8", "int3"]] * 8}, "unknown format 'int3' of the values of point 0"),
        ({"formats": [None, None, *[["int8", "int4"]] * 3, *[["int4", "int4"]] * 3]}, "checksum"),
    ],
    ids=str,
)
def test_a_file_with_wrong_formats_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = rewritten(tmp_path / "c.safetensors", made(**OF_FORMATS), **changes)
    with pytest.raises(FileFormatError, match=f"c.safetensors: .*{message}"):
        Calibration.load(path)


def concave(curve: NDArray[np.float64]) -> list[float]:
    """The least concave curve above: at each point the highest of all straight lines between two others."""
    places = range(len(curve))
    return [
        max(float(np.interp(at, (a, b), curve[[a, b]])) for a in places[: at + 1] for b in places[at:]) for at in places
    ]


@examples(40)
@given(st.data())
def test_the_plan_is_the_best_of_all(data: Any) -> None:
    """Brute force over all plans of three layers, by concave curves; a quarter of the total is shared alike."""
    kl = np.sort(np.array(data.draw(st.lists(st.floats(0, 1), min_size=9, max_size=9))).reshape(1, 3, 3))[..., ::-1]
    calibration = made(kl=kl.astype(np.float32), lengths=(12,), layers=(SPEC,) * 3)
    total = data.draw(st.integers(3, 36))
    curves = [concave(curve) for curve in calibration.mean_curve(12)]

    def best_from(low: int) -> float:
        plans = ((a, b, total - a - b) for a in range(low, 13) for b in range(low, 13) if low <= total - a - b <= 12)
        return max(sum(curve[slots] for curve, slots in zip(curves, plan, strict=True)) for plan in plans)

    # A shared quarter that is no multiple of three gives some layers one slot more than others.
    fewest, most = (max(1, total // 4 // 3), max(1, -(-(total // 4) // 3)))
    found = xkv_fx.solve(calibration, total_tokens=total, multiple=1).capacities
    value = sum(curve[slots] for curve, slots in zip(curves, found, strict=True))
    assert min(found) >= fewest
    assert best_from(most) - 1e-9 <= value <= best_from(fewest) + 1e-9


def test_bytes_over_unequal_layers_keep_the_floor() -> None:
    wide = LayerSpec(4, 4, 16, 16, 4)
    budgets = xkv_fx.solve(
        made(layers=(SPEC, wide)), kv_bytes=32 * SPEC.slot_bytes() + 32 * wide.slot_bytes(), multiple=1
    )
    assert min(budgets.capacities) >= 8
    assert budgets.kv_bytes((SPEC, wide)) <= 32 * SPEC.slot_bytes() + 32 * wide.slot_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retention": 0.5}, "holds no retention"),
        ({"fraction": 0.5, "allocator": "xkv"}, "'xkv' needs an xkv_fx.Profile"),
        ({"fraction": 0.5, "allocator": "maxmin"}, "'maxmin' needs an xkv_fx.Profile"),
        ({"fraction": 0.5, "allocator": "entropy"}, "was not measured here"),
    ],
)
def test_what_a_calibration_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        xkv_fx.solve(made(), **options)


def test_a_profile_cannot_be_solved_as_a_calibration() -> None:
    curve = np.linspace(0, 1, 65, dtype=np.float32)
    profile = Profile((np.stack([curve, curve]),), Policy(), (SPEC, SPEC), "some model")
    with pytest.raises(BudgetError, match="'calibrated' needs"):
        xkv_fx.solve(profile, fraction=0.5, allocator="calibrated")
    assert xkv_fx.solve(made(), fraction=0.5, allocator="uniform").capacities == (32, 32)


def test_permuted_layers_give_a_permuted_plan() -> None:
    straight = xkv_fx.solve(made(), fraction=0.3, multiple=1).capacities
    reversed_plan = xkv_fx.solve(made(kl=KL[:, ::-1]), fraction=0.3, multiple=1).capacities
    assert reversed_plan == straight[::-1]


def test_scaled_divergences_give_the_same_plan() -> None:
    plans = {xkv_fx.solve(made(kl=KL * scale), fraction=0.3).capacities for scale in (1.0, 8.0, 0.125)}
    assert len(plans) == 1


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_above_a_floor_more_tokens_are_never_expected_to_stray_further(multiple: int) -> None:
    """A floor that stays: a quarter of the context is never below a quarter of the mean."""
    layers = 5
    rng = np.random.default_rng(3)
    for _ in range(4):
        kl = np.sort(rng.exponential(size=(1, layers, 3)) * 10.0 ** rng.integers(-4, 1, size=(1, layers, 1)))[..., ::-1]
        calibration = made(kl=kl.astype(np.float32), lengths=(64,), layers=(SPEC,) * layers)
        plans = [
            xkv_fx.solve(calibration, total_tokens=total, multiple=multiple, floor=16)
            for total in range(16 * layers, 64 * layers + 1, 7)
        ]
        assert min(min(plan.capacities) for plan in plans) == 16
        expected = np.array([plan.provenance.expected_kl for plan in plans], dtype=np.float64)
        assert np.diff(expected).max() <= 1e-9


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    made().save(path)
    assert Calibration.load(path) == made()
    assert load_measured(path) == made()
    curve = np.linspace(0, 1, 65, dtype=np.float32)
    profile = Profile((np.stack([curve, curve]),), Policy(), (SPEC, SPEC), "some model")
    profile.save(path)
    assert load_measured(path) == profile
    with pytest.raises(FileFormatError, match=r"not a xkv_fx\.calibration file"):
        Calibration.load(path)


def rewritten(
    path: Path, calibration: Calibration | None = None, tensors: dict[str, Any] | None = None, **changes: Any
) -> Path:
    (calibration or made()).save(path)
    with safetensors.safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()[HEADER])
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header |= changes
    safetensors.numpy.save_file(tensors or held, path, {HEADER: json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "newer"),
        ({"grid": [0.1, 0.2, 0.9]}, "checksum"),
        ({"grid": [0.2, 0.1, 0.9]}, "ascending"),
        ({"grid": "all"}, "wrong type"),
        ({"grid": ["0.1", "0.2", "0.9"]}, "wrong type"),
        ({"grid": [0.1, 0.2, 10**400]}, "'grid' must be a list, each item a finite number"),
        ({"continuation": True}, "'continuation' has the wrong type: True"),
        ({"lengths": [1]}, "prompts, layers, grid"),
        ({"lengths": ["a", "b"]}, "whole number"),
        ({"surprise": 1}, "its fields are"),
        ({"version": 2}, "it lacks 'formats'"),
        ({"layers": [{}, {}]}, "fields of layer 0"),
        ({"tensors": {"kl": KL.astype(np.float64)}}, "float32"),
        ({"tensors": {"other": KL}}, "an array 'kl' alone"),
        ({"tensors": {"kl": KL, "key_mean_0": KL[0]}}, "an array 'kl' alone"),
        ({"tensors": {"kl": KL * 2}}, "checksum"),
        ({"tensors": {"kl": KL * np.nan}}, "NaN"),
    ],
)
def test_a_tampered_file_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = rewritten(tmp_path / "c.safetensors", **changes)
    with pytest.raises(FileFormatError, match=message) as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 40, b"\x08" + b"\0" * 7 + b'{"a": 1}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    for load in (Calibration.load, load_measured):
        with pytest.raises(FileFormatError):
            load(path)


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    made().save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FileFormatError, match="cut off"):
        Calibration.load(path)


def test_expected_kl_survives_the_plans_file(tmp_path: Path) -> None:
    budgets = xkv_fx.solve(made(), fraction=0.5)
    budgets.save(tmp_path / "plan.json")
    assert Budgets.load(tmp_path / "plan.json") == budgets


def test_it_prints_as_short_tables() -> None:
    said = str(made())
    assert said.startswith("<calibration of ")
    assert "stored as model\nlayer" in said
    assert "array(" not in said + repr(made())
    both = Calibration(
        np.ones((1, 2, 5), np.float32), (0.25, 0.5, 0.25, 0.5, 1.0), (8,), 4, Policy(), (SPEC,) * 2, "a model",
        (None, None, *(("int8", "int4"),) * 3),
    )  # fmt: skip
    lines = str(both).splitlines()
    assert (
        lines[0]
        == "<calibration of a model: 2 layers, 1 prompts of up to 8 tokens, formats model, int8/int4, snapkv, ring>"
    )
    assert lines[2:4] == ["stored as model", "layer    25.0%    50.0%   100.0%"]
    assert lines[4].split() == ["0", "1.0000", "1.0000", "0.0000"]
    assert lines[6:8] == ["stored as int8/int4", "layer    25.0%    50.0%   100.0%"]
    assert lines[8].split() == ["0", "1.0000", "1.0000", "1.0000"]
