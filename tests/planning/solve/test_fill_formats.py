"""Capacities and formats together: never too many bytes, none left that a slot could take, and as good as an exact
multiple-choice knapsack says, but for less than one step."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, milp

from xkv_fx.errors import BudgetError
from xkv_fx.planning.solve.fill_formats import capacities_and_pairs

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """Layers with a few pairs of formats, and bytes enough for one slot in each."""

    curves: Array
    slot_bytes: Array
    least: Array
    caps: list[int]
    kv_bytes: int
    multiple: int
    floor: int

    def solve(self) -> tuple[Array, Array]:
        return capacities_and_pairs(
            self.curves, self.slot_bytes, self.least, self.kv_bytes, caps=self.caps, floor=self.floor,
            multiple=self.multiple,
        )  # fmt: skip

    @property
    def layers(self) -> int:
        return len(self.caps)

    def options(self, layer: int, multiple: int, measured: bool) -> dict[tuple[int, int], tuple[int, float]]:
        """Bytes and KL of each (capacity, pair) that may be chosen; `measured` keeps the pair of the fewest bytes, too,
        above the least capacity that was measured."""
        cap, cheapest = self.caps[layer], int(self.slot_bytes[:, layer].argmin())
        floor = min(self.floor, cap)
        found = {}
        for pair, (price, least) in enumerate(zip(self.slot_bytes[:, layer], self.least[:, layer], strict=True)):
            start = floor if pair == cheapest and not measured else max(floor, int(least))
            for capacity in range(1, cap + 1):
                if capacity == cap or (capacity >= start and capacity % multiple == 0):
                    found[capacity, pair] = (int(price) * capacity, float(self.curves[pair, layer, capacity]))
        return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layers, pairs, context = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    curves = -np.sort(-(rng.random((pairs, layers, context + 1)) ** rng.integers(1, 6, (pairs, layers, 1))))
    curves *= 10.0 ** rng.integers(-3, 1, (1, layers, 1))
    if draw(st.booleans()):
        curves = np.round(curves, 2)  # ties, and capacities that gain nothing
    slot_bytes = rng.integers(3, 40, (pairs, layers))
    least = rng.integers(1, max(2, context // 2), (pairs, layers))
    caps = rng.integers(1, context + 1, layers).tolist()
    floor = draw(st.integers(1, min(3, context)))
    floors, fewest = np.minimum(floor, caps), slot_bytes.min(0)
    lowest, highest = int(floors @ fewest), int(slot_bytes.max(0) @ caps)
    kv_bytes = draw(st.integers(lowest, highest + 5))
    return Case(curves, slot_bytes, least, caps, kv_bytes, draw(st.sampled_from([1, 2, 4, 16])), floor)


@given(case=cases())
@examples(150)
def test_bytes_are_used_up_and_never_exceeded(case: Case) -> None:
    capacities, pairs = case.solve()
    price = case.slot_bytes[pairs, range(case.layers)]
    left = case.kv_bytes - int(capacities @ price)
    assert left >= 0
    for layer, (capacity, pair) in enumerate(zip(capacities, pairs, strict=True)):
        cap, cheapest = case.caps[layer], case.slot_bytes[:, layer].min()
        assert min(case.floor, cap) <= capacity <= cap
        assert capacity == cap or price[layer] > left, "a further slot would fit"
        assert price[layer] == cheapest or capacity >= min(cap, case.least[pair, layer]), "it was not measured"
        for (_, _), (size, kl) in case.options(layer, case.multiple, measured=True).items():
            if size <= capacity * price[layer] + left:
                assert kl >= case.curves[pair, layer, capacity], "another option would be better"


def best(options: list[dict[tuple[int, int], tuple[int, float]]], kv_bytes: int) -> float | None:
    """The least sum of KL of one option a layer within the bytes: HiGHS on the multiple-choice knapsack itself."""
    found = [(layer, size, kl) for layer, of in enumerate(options) for size, kl in of.values()]
    layer, size, kl = (np.array(part) for part in zip(*found, strict=True))
    one_each = (layer == np.arange(len(options))[:, None]).astype(float)
    result = milp(
        kl, integrality=np.ones(len(kl)), bounds=(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size, -np.inf, kv_bytes)],
    )  # fmt: skip
    return None if result.x is None else float(result.fun)


def largest_step(options: dict[tuple[int, int], tuple[int, float]]) -> float:
    """The largest fall of KL between corners of the lower convex hull, found by trying all pairs of options."""
    points = sorted(set(options.values()))
    steps = [0.0]
    at = min(points)
    while True:
        later = [point for point in points if point[0] > at[0] and point[1] < at[1]]
        if not later:
            return max(steps)
        corner = max(later, key=lambda point: ((at[1] - point[1]) / (point[0] - at[0]), -point[0]))
        steps.append(at[1] - corner[1])
        at = corner


@given(case=cases())
@examples(80)
def test_no_choice_is_better_by_a_step(case: Case) -> None:
    capacities, pairs = case.solve()
    found = float(case.curves[pairs, range(case.layers), capacities].sum())
    measured = [case.options(layer, case.multiple, measured=True) for layer in range(case.layers)]
    exact = best(measured, case.kv_bytes)
    if exact is None:  # not even the least that was measured fits
        return
    assert found < exact + max(map(largest_step, measured)) + 1e-9
    assert (
        found >= (best([case.options(at, 1, measured=False) for at in range(case.layers)], case.kv_bytes) or 0) - 1e-6
    )


def test_bytes_of_all_at_the_best_give_the_best() -> None:
    """And one byte less costs no more than the step that no longer fits."""
    curves = np.array([[[9.0, 4, 2, 1, 0]] * 2, [[9.0, 4.5, 2.5, 1.4, 0.3]] * 2])
    slot_bytes, least = np.array([[8, 8], [4, 4]]), np.array([[1, 1], [1, 1]])
    for kv_bytes, capacities, pairs in [
        (64, [4, 4], [0, 0]),
        (63, [4, 4], [0, 1]),
        (48, [4, 4], [0, 1]),
        (47, [4, 4], [1, 1]),
        (32, [4, 4], [1, 1]),
        (31, [4, 3], [1, 1]),
        (8, [1, 1], [1, 1]),
    ]:
        found = capacities_and_pairs(curves, slot_bytes, least, kv_bytes, caps=[4, 4])
        assert (found[0].tolist(), found[1].tolist()) == (capacities, pairs)


def test_what_was_not_measured_is_the_last_resort() -> None:
    """Below the least that was measured a curve is a guess: only the pair of the fewest bytes goes there, if so."""
    falling = np.linspace(1, 0, 17)
    curves = np.stack((0.1 * falling, 0.5 + falling))[:, None]  # by its guesses, the first pair is always better
    slot_bytes, least = np.array([[4], [2]]), np.array([[12], [4]])
    for kv_bytes, capacity, pair in [(64, 16, 0), (48, 12, 0), (47, 16, 1), (8, 4, 1), (7, 3, 1), (2, 1, 1)]:
        capacities, pairs = capacities_and_pairs(curves, slot_bytes, least, kv_bytes, caps=[16], multiple=1)
        assert (capacities.tolist(), pairs.tolist()) == ([capacity], [pair])


def test_capacities_are_whole_blocks_but_for_what_is_left() -> None:
    rng = np.random.default_rng(0)
    curves = -np.sort(-rng.random((3, 6, 129)))
    slot_bytes = np.array([[16], [10], [6]]).repeat(6, 1)
    for kv_bytes in range(1000, 12_000, 613):
        capacities, pairs = capacities_and_pairs(
            curves, slot_bytes, np.full((3, 6), 8), kv_bytes, caps=[128] * 6, multiple=16
        )
        odd = {int(pair) for capacity, pair in zip(capacities, pairs, strict=True) if capacity % 16}
        assert sum(capacity % 16 != 0 for capacity in capacities) == len(odd), "at most one of each size"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bytes": 5}, "kv_bytes of 5 is below one slot a layer, which takes 6 bytes"),
        ({"kv_bytes": 11, "floor": 2}, "below the floor of 2 slots a layer, which takes 12 bytes"),
        ({"kv_bytes": 6.5}, "kv_bytes must be a whole number"),
        ({"floor": 9}, "a floor of 9 slots is above the context of 8"),
        ({"multiple": 0}, "multiple must be"),
    ],
)
def test_what_cannot_be_met_is_refused(options: dict[str, Any], message: str) -> None:
    curves, prices = np.tile(np.linspace(1, 0, 9), (2, 2, 1)), np.array([[8, 8], [3, 3]])
    with pytest.raises(BudgetError, match=message):
        capacities_and_pairs(curves, prices, np.ones((2, 2), int), **{"kv_bytes": 40, "caps": [8, 8], **options})
