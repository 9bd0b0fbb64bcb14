"""Byte budgets over layers of unequal slots: never exceeded, used up, and near the best by brute force."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from xkv_fx.errors import BudgetError
from xkv_fx.planning.solve.fill import capacities_for_total
from xkv_fx.planning.solve.fill_bytes import capacities_for_bytes

Array = NDArray[Any]


def random_curves(seed: int, layers: int, tokens: int) -> Array:
    gains = -np.sort(-np.random.default_rng(seed).integers(0, 9, size=(layers, tokens)), axis=1) + 0.0
    return np.concatenate((np.zeros((layers, 1)), np.cumsum(gains, axis=1)), 1)


@examples(80)
@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from([1, 2, 4, 16]), st.integers(1, 9), st.data())
def test_bytes_are_used_up_and_never_exceeded(layers: int, tokens: int, multiple: int, floor: int, data: Any) -> None:
    seed = data.draw(st.integers(0, 2**32))
    price = np.array(data.draw(st.lists(st.sampled_from([3, 4, 64, 1000]), min_size=layers, max_size=layers)))
    caps = np.array(data.draw(st.lists(st.integers(1, tokens), min_size=layers, max_size=layers)))
    floor = min(floor, tokens)
    floors = np.minimum(floor, caps)
    kv_bytes = data.draw(st.integers(int(floors @ price), int(caps @ price) + 100))
    capacities = capacities_for_bytes(
        random_curves(seed, layers, tokens), price, kv_bytes, floor=floor, caps=caps, multiple=multiple
    )
    left = kv_bytes - int(capacities @ price)
    assert left >= 0
    assert (capacities >= floors).all()
    assert (capacities <= caps).all()
    assert ((capacities == caps) | (price > left)).all(), "a layer below its cap could take another slot"


@pytest.mark.parametrize("seed", range(8))
def test_short_of_the_best_by_less_than_one_slot(seed: int) -> None:
    curves = random_curves(seed, 3, 7)
    price = np.random.default_rng(seed).integers(2, 9, size=3)
    layers = np.arange(3)
    choices = np.array(list(itertools.product(range(1, 8), repeat=3)))
    values = curves[layers, choices].sum(1)
    for kv_bytes in range(int(price.sum()), int(7 * price.sum()) + 1, 5):
        capacities = capacities_for_bytes(curves, price, kv_bytes)
        best = values[choices @ price <= kv_bytes].max()
        assert curves[layers, capacities].sum() > best - np.diff(curves).max() - 1e-9


@pytest.mark.parametrize("multiple", [1, 8])
def test_equal_slots_are_a_total(multiple: int) -> None:
    curves = random_curves(1, 4, 40)
    capacities = capacities_for_bytes(curves, [12] * 4, 12 * 88 + 5, multiple=multiple)
    assert (capacities == capacities_for_total(curves, 88, multiple=multiple)).all()


def test_a_cheap_layer_is_preferred_at_equal_gain() -> None:
    curves = np.tile(np.arange(9.0), (2, 1))
    assert capacities_for_bytes(curves, [100, 1], 108).tolist() == [1, 8]
    assert capacities_for_bytes(curves, [1, 100], 208).tolist() == [8, 2]
    assert capacities_for_bytes(curves, [100, 1], 10_000).tolist() == [8, 8]


def test_blocks_come_whole_but_for_the_last_of_each_price() -> None:
    curves = np.outer([2.0, 1.0], np.arange(33))
    assert capacities_for_bytes(curves, [2, 3], 16 * 5 + 16 * 2, multiple=16).tolist() == [32, 16]
    assert capacities_for_bytes(curves, [2, 3], 16 * 5 + 16 * 2 - 1, multiple=16).tolist() == [31, 16]
    assert capacities_for_bytes(curves, [7, 4], 16 * 11 + 13, multiple=16).tolist() == [17, 17]
    assert capacities_for_bytes(curves, [2, 3], 8 * 5, multiple=16).tolist() == [8, 8]


@pytest.mark.parametrize(
    ("slot_bytes", "kv_bytes", "options", "message"),
    [
        ([4, 8], 11, {}, "kv_bytes of 11 is below one slot a layer, which takes 12 bytes"),
        ([4, 8], 23, {"floor": 2}, "below the floor of 2 slots a layer, which takes 24 bytes"),
        ([4, 8], 40.0, {}, "kv_bytes must be a whole number of bytes; got 40.0"),
        ([4, 8], True, {}, "kv_bytes must be a whole number"),
        ([4, 0], 40, {}, "slot_bytes must be 2 whole numbers of at least 1"),
        ([4], 40, {}, "slot_bytes must be 2 whole numbers"),
        ([4.0, 8.0], 40, {}, "slot_bytes must be 2 whole numbers"),
        ([4, 8], 40, {"multiple": 0}, "multiple must be"),
        ([4, 8], 40, {"caps": [5, 6]}, "caps must lie between 1 and the context of 5"),
    ],
)
def test_what_cannot_be_met_is_refused(slot_bytes: Any, kv_bytes: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        capacities_for_bytes(random_curves(0, 2, 5), slot_bytes, kv_bytes, **options)
