"""Allocators: the registry, what it checks, and `uniform` against water-filling token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from xkv_fx.errors import BudgetError
from xkv_fx.planning.solve import allocators as module
from xkv_fx.planning.solve import peer_allocators  # noqa: F401  (registers them)
from xkv_fx.planning.solve.allocators import allocator, allocator_names, register_allocator
from xkv_fx.planning.solve.fill import capacities_for_total

Array = NDArray[Any]


def curves_of(layers: int, context: int) -> Array:
    return np.tile(np.linspace(0, 1, context + 1), (layers, 1)) ** np.linspace(0.2, 1, layers)[:, None]


@pytest.fixture(autouse=True)
def registry_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_allocators", dict(module._allocators))


# The registry


def test_registered_names() -> None:
    assert allocator_names() == ("calibrated", "entropy", "maxmin", "pyramid", "squeeze", "uniform", "xkv")
    assert [allocator(name).name for name in allocator_names()] == list(allocator_names())


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BudgetError, match=r"unknown allocator 'ours'; registered are calibrated, entropy, .*xkv"):
        allocator("ours")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(BudgetError, match="'uniform' is registered already"):
        register_allocator("uniform")(capacities_for_total)


def test_xkv_is_the_solver() -> None:
    curves = curves_of(4, 50)
    options: dict[str, Any] = {"floor": 2, "caps": [50, 20, 50, 50], "multiple": 4}
    assert (allocator("xkv")(curves, 77, **options) == capacities_for_total(curves, 77, **options)).all()


def test_ones_own_allocator_is_registered_or_given() -> None:
    @register_allocator("first")
    def first(curves: Array, total: int, *, floor: int, caps: Array, multiple: int) -> list[int]:
        rest = total - floor * len(curves)
        return [floor + rest] + [floor] * (len(curves) - 1)

    class Last:
        name = "last"

        def __call__(self, curves: Array, total: int, *, floor: int, caps: Array, multiple: int) -> Array:
            return np.array(first(curves, total, floor=floor, caps=caps, multiple=multiple)[::-1])

    plan = allocator("first")(curves_of(3, 50), 30, floor=4)
    assert plan.tolist() == [22, 4, 4]
    assert plan.dtype == np.int64
    last: Any = Last()
    assert allocator(last).name == "last"
    assert allocator(last)(curves_of(3, 50), 30).tolist() == [1, 1, 28]
    assert allocator(allocator("first")) is allocator("first")


@pytest.mark.parametrize("given_allocator", [None, 3, len, object()])
def test_what_is_no_allocator_is_refused(given_allocator: Any) -> None:
    with pytest.raises(BudgetError, match="a registered name, or a callable with a name"):
        allocator(given_allocator)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([10, 10, 9], "'bad' returned a total of 29 tokens instead of 30"),
        ([30, 0, 0], "'bad' returned capacities outside the floor of 1 and the caps"),
        ([25, 4, 1], "'bad' returned capacities outside the floor of 1 and the caps"),
        ([15, 15], "instead of 3 whole numbers"),
        ([10.0, 10.0, 10.0], "'bad' returned float64"),
        (None, "instead of 3 whole numbers"),
    ],
)
def test_what_an_allocator_returns_is_checked(returned: Any, message: str) -> None:
    register_allocator("bad")(lambda curves, total, **options: returned)
    with pytest.raises(BudgetError, match=message):
        allocator("bad")(curves_of(3, 20), 30)


# Uniform


def token_by_token(total: int, lows: Array, caps: Array) -> list[int]:
    """Give the next token to the lowest layer that has room, the first of several."""
    capacities = lows.copy()
    while capacities.sum() < total:
        open_layers = np.flatnonzero(capacities < caps)
        capacities[open_layers[capacities[open_layers].argmin()]] += 1
    return [int(c) for c in capacities]


@examples(60)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 4), st.booleans(), st.data())
def test_uniform_is_water_filling(layers: int, context: int, floor: int, capped: bool, data: Any) -> None:
    limit = st.integers(1, context) if capped else st.just(context)
    caps = np.array(data.draw(st.lists(limit, min_size=layers, max_size=layers)))
    floor = min(floor, context)
    lows = np.minimum(floor, caps)
    for total in range(int(lows.sum()), int(caps.sum()) + 1):
        plan = allocator("uniform")(curves_of(layers, context), total, floor=floor, caps=caps)
        assert plan.tolist() == token_by_token(total, lows, caps)


@examples(40)
@given(st.integers(1, 6), st.integers(1, 70), st.sampled_from([2, 3, 8, 16]), st.integers(1, 20), st.data())
def test_uniform_in_blocks(layers: int, context: int, multiple: int, floor: int, data: Any) -> None:
    caps = np.array(data.draw(st.lists(st.integers(1, context), min_size=layers, max_size=layers)))
    floor = min(floor, context)
    floors = np.minimum(floor, caps)
    whole = np.minimum(-(-floors // multiple) * multiple, caps)
    total = data.draw(st.integers(int(floors.sum()), int(caps.sum())))
    plan = allocator("uniform")(curves_of(layers, context), total, floor=floor, caps=caps, multiple=multiple)
    assert plan.sum() == total
    assert (plan >= floors).all()
    assert (plan <= caps).all()
    if total >= whole.sum():
        assert ((plan % multiple != 0) & (plan != caps)).sum() <= 1
        below_cap = plan[(plan < caps) & (plan > whole)]
        assert below_cap.size == 0 or plan.max() - below_cap.min() <= multiple


def test_uniform_gives_the_rest_to_the_first_layers() -> None:
    uniform = allocator("uniform")
    assert uniform(curves_of(4, 64), 130).tolist() == [33, 33, 32, 32]
    assert uniform(curves_of(4, 64), 128, multiple=16).tolist() == [32, 32, 32, 32]
    assert uniform(curves_of(4, 64), 150, multiple=16).tolist() == [48, 38, 32, 32]
    assert uniform(curves_of(4, 64), 256, multiple=16).tolist() == [64, 64, 64, 64]
    assert uniform(curves_of(4, 64), 120, caps=[64, 10, 64, 64]).tolist() == [37, 10, 37, 36]
    assert uniform(curves_of(4, 64), 20, multiple=16).tolist() == [8, 4, 4, 4]


@pytest.mark.parametrize("name", ["uniform", "xkv"])
@pytest.mark.parametrize(
    ("total", "message"), [(3, "below one slot a layer"), (257, r"above layers x context = 4 x 64 = 256")]
)
def test_totals_out_of_range_are_refused(name: str, total: int, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        allocator(name)(curves_of(4, 64), total)
