"""What holds of every plan that `solve` makes, whichever the measurements, allocator, constraint and model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from xkv_fx import Budgets, Calibration, LayerSpec, Policy, Profile, solve
from xkv_fx.errors import BudgetError
from xkv_fx.planning.solve.allocators import allocator, allocator_names

OF_CALIBRATIONS = ("calibrated", "uniform", "pyramid")
OF_PROFILES = tuple(name for name in allocator_names() if name != "calibrated")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurements of random layers, and the longest context that plans are made for."""

    data: Profile | Calibration
    context: int

    @property
    def caps(self) -> list[int]:
        return [spec.effective_capacity(self.context) for spec in self.data.layers]


@st.composite
def measurements(draw: st.DrawFn) -> Measured:
    """Concave curves, or divergences that fall; layers of several shapes, some of them with a sliding window."""
    layers = tuple(
        LayerSpec(4, draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([2, 8])), 4, 2, window)
        for window in draw(st.lists(st.none() | st.integers(1, 60), min_size=1, max_size=5))
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    context, count = draw(st.integers(4, 90)), len(layers)
    policy = Policy(eviction="append", sinks=draw(st.integers(0, 2)))
    if draw(st.booleans()):
        kl = -np.sort(-rng.exponential(size=(2, count, 3)), axis=2).astype(np.float32)
        return Measured(Calibration(kl, (0.1, 0.3, 0.6), (context, 3), 4, policy, layers, "a model"), context)
    gains = -np.sort(-(rng.random((count, context)) ** rng.integers(1, 6, (count, 1)) + 1e-6), axis=1)
    for layer, spec in enumerate(layers):
        gains[layer, spec.effective_capacity(context) :] = 0.0  # all that it attends to is held
    curves = np.concatenate((np.zeros((count, 1)), np.cumsum(gains, 1)), 1)
    curves = (curves / curves[:, -1:]).astype(np.float32)
    means = {name: rng.random(count).tolist() for name in ("preference", "similarity")}
    return Measured(Profile((curves,), policy, layers, "a model", means), context)


@given(measured=measurements(), data=st.data())
@examples(60)
def test_laws_of_plans(measured: Measured, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    layers, caps = measured.data.layers, measured.caps
    names = OF_CALIBRATIONS if isinstance(measured.data, Calibration) else OF_PROFILES
    options: dict[str, Any] = {
        "allocator": data.draw(st.sampled_from(names)),
        "multiple": data.draw(st.sampled_from([1, 4, 16])),
        "floor": data.draw(st.integers(1, min(4, measured.context))),
    }
    lowest = sum(min(options["floor"], cap) for cap in caps)
    total = data.draw(st.integers(lowest, sum(caps)))
    plan = solve(measured.data, total_tokens=total, **options)
    check(plan, measured, options)
    assert plan.total_tokens == total
    assert solve(measured.data, total_tokens=total, **options) == plan

    kv_bytes = data.draw(st.integers(plan.kv_bytes(layers), 2 * plan.kv_bytes(layers)))
    by_bytes = solve(measured.data, kv_bytes=kv_bytes, **options)
    check(by_bytes, measured, options)
    assert by_bytes.kv_bytes(layers) <= kv_bytes

    path = tmp_path_factory.getbasetemp() / "lawful.json"
    plan.save(path)
    assert Budgets.load(path) == plan


def check(plan: Budgets, measured: Measured, options: dict[str, Any]) -> None:
    for capacity, cap in zip(plan.capacities, measured.caps, strict=True):
        assert min(options["floor"], cap) <= capacity <= cap
    assert plan.policy == measured.data.policy
    assert plan.provenance.allocator == options["allocator"]
    assert plan.provenance.context == measured.context
    assert plan.provenance.source == measured.data.digest()


@given(measured=measurements().filter(lambda measured: isinstance(measured.data, Profile)), data=st.data())
@examples(30)
def test_no_plan_of_as_many_tokens_keeps_more_than_the_solvers(measured: Measured, data: st.DataObject) -> None:
    """Of the peers', of any at random; and one more token never keeps less."""
    caps = measured.caps
    total = data.draw(st.integers(len(caps), sum(caps)))
    best = solve(measured.data, total_tokens=total, multiple=1).provenance.expected_retention or 0.0
    for name in OF_PROFILES:
        other = solve(measured.data, total_tokens=total, multiple=1, allocator=name)
        assert (other.provenance.expected_retention or 0.0) <= best + 1e-6
    if total < sum(caps):
        more = solve(measured.data, total_tokens=total + 1, multiple=1)
        assert (more.provenance.expected_retention or 0.0) >= best
    else:
        with pytest.raises(BudgetError, match="above"):
            solve(measured.data, total_tokens=total + 1, multiple=1)


@given(
    measured=measurements().filter(lambda measured: isinstance(measured.data, Calibration)),
    multiple=st.sampled_from([1, 3, 4, 16]),
    floor=st.integers(1, 4),
)
@examples(15)
def test_a_larger_total_takes_nothing_from_any_layer(measured: Measured, multiple: int, floor: int) -> None:
    """Also of the allocator that shares a part of the total alike; so the planned KL never rises."""
    caps, curves = measured.caps, measured.data.mean_curve(measured.context)
    before = np.zeros(len(caps), dtype=np.int64)
    for total in range(sum(min(floor, cap) for cap in caps), sum(caps) + 1):
        plan = allocator("calibrated")(curves, total, floor=floor, caps=caps, multiple=multiple)
        assert (plan >= before).all()
        before = plan
    assert before.tolist() == caps


@given(seed=st.integers(0, 2**32), fraction=st.floats(0.05, 1.0), multiple=st.sampled_from([1, 4, 16]))
@examples(30)
def test_permuted_layers_get_a_permuted_plan_and_a_quarter_is_shared(seed: int, fraction: float, multiple: int) -> None:
    rng = np.random.default_rng(seed)
    curves = np.concatenate((np.zeros((5, 1)), np.cumsum(-np.sort(-rng.exponential(size=(5, 64)), axis=1), 1)), 1)
    total, order = max(5, int(fraction * 5 * 64)), rng.permutation(5)
    plan = allocator("calibrated")(curves, total, multiple=multiple)
    assert (allocator("calibrated")(curves[order], total, multiple=multiple) == plan[order]).all()
    assert plan.min() >= total // 4 // 5 // multiple * multiple


@given(measured=measurements())
@examples(30)
def test_measurements_come_back_from_their_files(measured: Measured, tmp_path_factory: pytest.TempPathFactory) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "lawful.safetensors"
    measured.data.save(path)
    loaded = type(measured.data).load(path)
    assert loaded == measured.data
    assert (loaded.layers, loaded.policy, loaded.model) == (
        measured.data.layers, measured.data.policy, measured.data.model,
    )  # fmt: skip
