"""The solver against brute force over all allocations and against min-cost flow; bounds, blocks, order and errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import networkx as nx
import numpy as np
import pytest
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from xkv_fx.errors import BudgetError
from xkv_fx.planning.data.curves import mean_retention
from xkv_fx.planning.solve.fill import (
    capacities_for_retention,
    capacities_for_total,
    fill_by_gain,
)

Array = NDArray[Any]


def value_of(gains: Array, capacities: Any) -> float:
    return float(sum(row[:capacity].sum() for row, capacity in zip(gains, capacities, strict=True)))


def allocations(layers: int, total: int, floor: int, caps: list[int]) -> Iterator[tuple[int, ...]]:
    ranges = [range(min(floor, cap), cap + 1) for cap in caps[:layers]]
    return (allocation for allocation in itertools.product(*ranges) if sum(allocation) == total)


def random_gains(rng: np.random.Generator, layers: int, tokens: int, ties: bool = True) -> Array:
    gains = rng.integers(0, 6, size=(layers, tokens)) / 4 if ties else rng.random((layers, tokens)) ** 4
    return -np.sort(-gains, axis=1)


def random_curves(rng: np.random.Generator, layers: int, tokens: int, concave: bool = True) -> Array:
    """Retention curves from 0 to 1; without `concave` a few tokens at the start are taken out of order."""
    gains = random_gains(rng, layers, tokens, ties=False) + 1e-9
    if not concave:
        gains[:, : tokens // 4] = gains[:, : tokens // 4][:, ::-1]
    curves = np.concatenate((np.zeros((layers, 1)), np.cumsum(gains, axis=1)), 1)
    curves /= curves[:, -1:]
    return curves


# The optimum


@examples(80)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 3), st.sampled_from([np.float32, np.float64]), st.data())
def test_optimum_by_brute_force(layers: int, tokens: int, floor: int, dtype: Any, data: Any) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    gains = random_gains(rng, layers, tokens, ties=data.draw(st.booleans())).astype(dtype)
    floor = min(max(1, floor), tokens)
    caps = data.draw(st.lists(st.integers(1, tokens), min_size=layers, max_size=layers))
    lowest = sum(min(floor, cap) for cap in caps)
    total = data.draw(st.integers(lowest, sum(caps)))

    capacities = fill_by_gain(gains, total, floor=floor, caps=caps)
    assert capacities.dtype == np.int64
    assert capacities.sum() == total
    assert (capacities <= caps).all()
    assert (capacities >= np.minimum(floor, caps)).all()
    best = max(value_of(gains, allocation) for allocation in allocations(layers, total, floor, caps))
    assert value_of(gains, capacities) == pytest.approx(best, rel=1e-6)


def by_min_cost_flow(gains: Array, total: int, floor: int, caps: list[int]) -> int:
    """The best value by a general method: each token below the caps is a way for one unit from source to sink."""
    graph = nx.DiGraph()
    graph.add_node("source", demand=-total)
    graph.add_node("sink", demand=total)
    floor_bonus = 10**9  # worth more than all gains together
    for layer, row in enumerate(gains):
        for token in range(caps[layer]):
            worth = int(row[token]) + (floor_bonus if token < floor else 0)
            graph.add_edge("source", (layer, token), capacity=1, weight=-worth)
            graph.add_edge((layer, token), "sink", capacity=1, weight=0)
    cost, _ = nx.network_simplex(graph)
    return int(-cost - floor_bonus * floor * len(gains))


@pytest.mark.parametrize("case", range(6))
def test_optimum_by_min_cost_flow(case: int) -> None:
    rng = np.random.default_rng(case)
    gains = -np.sort(-rng.integers(0, 50 if case % 2 else 10_000, size=(6, 40)), axis=1)
    floor = int(rng.integers(1, 6))
    caps = [40] * 6 if case < 2 else rng.integers(floor, 41, size=6).tolist()
    total = int(rng.integers(6 * floor, sum(caps) + 1))
    capacities = fill_by_gain(gains.astype(np.float64), total, floor=floor, caps=caps)
    assert value_of(gains, capacities) == by_min_cost_flow(gains, total, floor, caps)


def test_many_layers_equal_a_pooled_sort() -> None:
    rng = np.random.default_rng(1)
    gains = random_gains(rng, 30, 500, ties=False).astype(np.float32)
    total = 6_001
    capacities = fill_by_gain(gains, total)
    pooled = np.argsort(-gains, axis=None, kind="stable")[:total] // 500
    assert (capacities == np.bincount(pooled, minlength=30)).all()


# Order and scale


def test_ties_go_to_lower_layers_first() -> None:
    assert fill_by_gain(np.ones((3, 4)), 7).tolist() == [4, 2, 1]
    assert fill_by_gain(np.ones((3, 4)), 7, multiple=2).tolist() == [3, 2, 2]
    assert fill_by_gain(np.zeros((3, 4)), 7).tolist() == [4, 2, 1]
    assert fill_by_gain(np.array([[3.0, 1.0, -0.0], [3.0, 2.0, 0.0]]), 5).tolist() == [3, 2]


def test_permuting_layers_permutes_the_plan() -> None:
    rng = np.random.default_rng(2)
    gains = random_gains(rng, 7, 60, ties=False)
    order = rng.permutation(7)
    for total, multiple in [(50, 1), (222, 1), (200, 8), (419, 4)]:
        plan = fill_by_gain(gains, total, multiple=multiple)
        assert (fill_by_gain(gains[order], total, multiple=multiple) == plan[order]).all()


@pytest.mark.parametrize("factor", [2.0**-100, 0.25, 3.0, 1e6])
def test_scaling_gains_changes_nothing(factor: float) -> None:
    gains = random_gains(np.random.default_rng(3), 7, 60, ties=False)
    for multiple in (1, 4):
        assert (
            fill_by_gain(gains * factor, 150, multiple=multiple) == fill_by_gain(gains, 150, multiple=multiple)
        ).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_gains_are_ordered_exactly(dtype: Any) -> None:
    info = np.finfo(dtype)
    gains = np.array([[info.max, 1.0, info.tiny], [1.0 + info.eps, info.smallest_subnormal, 0.0]], dtype=dtype)
    plans = [fill_by_gain(gains, total).tolist() for total in range(2, 7)]
    assert plans == [[1, 1], [2, 1], [3, 1], [3, 2], [3, 3]]


def test_gains_are_left_alone_and_may_be_views() -> None:
    wide = random_gains(np.random.default_rng(4), 6, 50)
    gains = wide[::2, 5:]
    before = wide.copy()
    assert (fill_by_gain(gains, 60) == fill_by_gain(gains.copy(), 60)).all()
    assert (wide == before).all()


def test_rises_that_rounding_explains_are_taken() -> None:
    gains = np.array([[0.5, 0.3, 0.3 + 1e-16, 0.1]])
    assert fill_by_gain(gains, 3).tolist() == [3]


# Totals and blocks


@examples(60)
@given(st.integers(1, 5), st.integers(1, 50), st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]), st.integers(1, 9), st.data())
def test_totals_are_exact_and_plans_nested(layers: int, tokens: int, multiple: int, floor: int, data: Any) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    gains = random_gains(rng, layers, tokens)
    caps = rng.integers(1, tokens + 1, size=layers)
    floor = min(floor, tokens)
    floors = np.minimum(floor, caps)
    whole = np.minimum(-(-floors // multiple) * multiple, caps)
    previous = None
    for total in range(int(floors.sum()), int(caps.sum()) + 1):
        capacities = fill_by_gain(gains, total, floor=floor, caps=caps, multiple=multiple)
        assert capacities.sum() == total
        assert (capacities >= floors).all()
        assert (capacities <= caps).all()
        if total >= whole.sum():
            in_part = (capacities % multiple != 0) & (capacities != caps)
            assert in_part.sum() <= 1, "one layer at most holds part of a block"
        if previous is not None:
            assert (capacities >= previous).all(), "a larger total takes a slot from no layer, whatever the blocks"
        previous = capacities


def test_blocks_are_the_best_whole_blocks() -> None:
    rng = np.random.default_rng(5)
    gains = random_gains(rng, 3, 24, ties=False)
    for total in range(12, 73, 4):
        capacities = fill_by_gain(gains, total, multiple=4)
        choices = [c for c in itertools.product(range(4, 25, 4), repeat=3) if sum(c) == total]
        assert value_of(gains, capacities) == pytest.approx(max(value_of(gains, choice) for choice in choices))


def test_rest_of_the_total_goes_where_the_next_block_would() -> None:
    gains = np.array([[9.0, 9.0, 1.0, 1.0, 0.0, 0.0], [9.0, 9.0, 5.0, 2.0, 1.0, 1.0]])
    assert fill_by_gain(gains, 4, multiple=2).tolist() == [2, 2]
    assert fill_by_gain(gains, 5, multiple=2).tolist() == [2, 3]
    assert fill_by_gain(gains, 6, multiple=2).tolist() == [2, 4]


def test_the_last_block_ends_at_the_cap_and_counts_by_gain_per_token() -> None:
    gains = np.array([[5.0] * 5 + [0.0] * 3, [1.0] * 8])
    assert fill_by_gain(gains, 9, caps=[5, 8], multiple=4).tolist() == [5, 4]
    assert fill_by_gain(gains, 12, caps=[5, 8], multiple=4).tolist() == [5, 7]
    gains = np.array([[5.0] * 4 + [0.5] * 4, [1.0] * 8])
    assert fill_by_gain(gains, 12, caps=[5, 8], multiple=4).tolist() == [4, 8]
    assert fill_by_gain(gains, 13, caps=[5, 8], multiple=4).tolist() == [5, 8]


def test_parts_up_to_the_caps_are_filled() -> None:
    gains = np.array([[4.0] * 7, [3.0] * 7, [5.0] * 7])
    caps = [7, 6, 5]
    assert fill_by_gain(gains, 12, caps=caps, multiple=4).tolist() == [4, 4, 4]
    assert fill_by_gain(gains, 13, caps=caps, multiple=4).tolist() == [4, 4, 5]
    assert fill_by_gain(gains, 15, caps=caps, multiple=4).tolist() == [6, 4, 5]
    assert fill_by_gain(gains, 18, caps=caps, multiple=4).tolist() == [7, 6, 5]


@pytest.mark.parametrize(
    ("total", "block"), [(96, 16), (95, 8), (48, 8), (47, 4), (24, 4), (23, 2), (12, 2), (11, 1), (6, 1)]
)
def test_blocks_get_smaller_where_a_total_is_small(total: int, block: int) -> None:
    capacities = fill_by_gain(random_gains(np.random.default_rng(6), 6, 64), total, multiple=16)
    assert capacities.sum() == total
    assert (capacities % block != 0).sum() <= 1
    assert capacities.min() >= block


def test_a_block_that_is_no_power_of_two_shrinks_to_one_that_divides_it() -> None:
    gains = random_gains(np.random.default_rng(6), 4, 48)
    assert fill_by_gain(gains, 48, multiple=12).tolist() == [12, 12, 12, 12]
    assert fill_by_gain(gains, 16, multiple=12).tolist() == [4, 4, 4, 4]


def test_a_layer_whose_cap_is_below_the_floor_gets_its_cap() -> None:
    gains = random_gains(np.random.default_rng(7), 3, 40)
    capacities = fill_by_gain(gains, 50, floor=16, caps=[40, 5, 40], multiple=8)
    assert capacities[1] == 5
    assert capacities.min(initial=99, where=[True, False, True]) >= 16


# From curves


@pytest.mark.parametrize("concave", [True, False])
@pytest.mark.parametrize(("multiple", "floor"), [(1, 1), (2, 1), (6, 5), (8, 3), (12, 1), (16, 1), (16, 9), (40, 1)])
def test_more_budget_never_keeps_less(concave: bool, multiple: int, floor: int) -> None:
    """Not where the blocks get smaller for a small total either."""
    curves = random_curves(np.random.default_rng(8), 5, 40, concave)
    totals = range(5 * floor, 201)
    kept = [
        mean_retention(curves, capacities_for_total(curves, total, floor=floor, multiple=multiple)) for total in totals
    ]
    assert (np.diff(kept) >= 0).all()
    assert kept[-1] == 1.0


def test_curves_are_filled_by_their_majorants() -> None:
    curves = np.array([[0.0, 0.0, 0.0, 0.9, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0]])
    assert capacities_for_total(curves, 4).tolist() == [3, 1]
    assert mean_retention(curves, np.array([3, 1])) == pytest.approx((0.9 + 0.25) / 2)


@pytest.mark.parametrize("concave", [True, False])
@pytest.mark.parametrize("retention", [1e-9, 0.3, 0.85, 0.999, 1.0])
def test_retention_takes_the_fewest_tokens(concave: bool, retention: float) -> None:
    curves = random_curves(np.random.default_rng(9), 4, 30, concave)
    capacities = capacities_for_retention(curves, retention)
    total = int(capacities.sum())
    assert mean_retention(curves, capacities) >= retention
    assert (capacities == capacities_for_total(curves, total)).all()
    if total > 4:
        assert mean_retention(curves, capacities_for_total(curves, total - 1)) < retention


def test_retention_is_the_optimum_of_concave_curves() -> None:
    curves = random_curves(np.random.default_rng(10), 3, 8)
    for retention in (0.4, 0.7, 0.95):
        enough = [
            sum(choice)
            for choice in itertools.product(range(1, 9), repeat=3)
            if mean_retention(curves, choice) >= retention
        ]
        assert capacities_for_retention(curves, retention).sum() == min(enough)


@pytest.mark.parametrize("retention", [0.2, 0.8, 0.97, 1.0])
def test_retention_in_whole_blocks(retention: float) -> None:
    curves = random_curves(np.random.default_rng(11), 4, 50)
    caps = np.array([50, 30, 47, 16])
    for layer, cap in enumerate(caps):
        curves[layer, cap:] = 1.0
    capacities = capacities_for_retention(curves, retention, caps=caps, multiple=8, floor=3)
    assert mean_retention(curves, capacities) >= retention
    assert ((capacities % 8 == 0) | (capacities == caps)).all()
    assert (capacities >= 8).all()
    for total in range(int(capacities.sum()) - 1, 31, -1):
        fewer = capacities_for_total(curves, total, caps=caps, multiple=8, floor=3)
        if ((fewer % 8 == 0) | (fewer == caps)).all():
            assert mean_retention(curves, fewer) < retention
            break


# Errors


@pytest.mark.parametrize(
    ("total", "options", "message"),
    [
        (2, {}, "total of 2 tokens is below one slot a layer; 3 layers need at least 3"),
        (0, {}, "below one slot a layer"),
        (-5, {}, "below one slot a layer"),
        (5, {"floor": 2}, "below the floor of 2 slots a layer; 3 layers need at least 6"),
        (16, {}, "above layers x context = 3 x 5 = 15"),
        (14, {"caps": [5, 3, 5]}, "within layers x context = 15, but above the 13 that the layers can hold"),
        (7.0, {}, "whole number of tokens; got 7.0"),
        (True, {}, "whole number of tokens; got True"),
        (9, {"floor": 0}, "floor must be a whole number of at least 1"),
        (9, {"floor": 1.5}, "floor must be"),
        (9, {"floor": 6}, "floor of 6 slots is above the context of 5"),
        (9, {"multiple": 0}, "multiple must be a whole number of at least 1"),
        (9, {"multiple": None}, "multiple must be"),
        (9, {"caps": [5, 5]}, "caps must be 3 whole numbers"),
        (9, {"caps": [5, 5, 6]}, "caps must lie between 1 and the context of 5"),
        (9, {"caps": [5, 5, 0]}, "caps must lie between 1 and the context of 5"),
        (9, {"caps": [5.0, 5.0, 5.0]}, "caps must be 3 whole numbers"),
    ],
)
def test_bounds_that_cannot_be_kept_are_refused(total: Any, options: dict[str, Any], message: str) -> None:
    gains = random_gains(np.random.default_rng(12), 3, 5)
    curves = np.concatenate((np.zeros((3, 1)), np.cumsum(gains, axis=1)), 1)
    with pytest.raises(BudgetError, match=message):
        fill_by_gain(gains, total, **options)
    with pytest.raises(BudgetError, match=message):
        capacities_for_total(curves, total, **options)


@pytest.mark.parametrize(
    ("gains", "message"),
    [
        (np.array([[1.0, 0.5], [np.nan, 0.5]]), "layer 1 hold NaN"),
        (np.array([[1.0, 0.5], [1.0, np.nan]]), "layer 1 hold NaN"),
        (np.array([[np.inf, 0.5], [1.0, 0.5]]), "layer 0 hold NaN or an infinity"),
        (np.array([[1.0, 0.5], [1.0, -0.1]]), "layer 1 hold the negative value -0.1"),
        (np.array([[0.5, 1.0], [1.0, 0.5]]), "layer 0 rise"),
        (np.array([[1.0, 0.5, 0.6], [3.0, 2.0, 1.0]], dtype=np.float32), "layer 0 rise"),
        (np.array([1.0, 0.5]), r"\[layers, context\]"),
        (np.zeros((2, 0)), r"\(2, 0\)"),
        (np.array([[2, 1]]), "int64"),
        ([[2.0, 1.0]], "list"),
    ],
)
def test_gains_that_cannot_be_used_are_refused(gains: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        fill_by_gain(gains, 3)


@pytest.mark.parametrize("retention", [0, 0.0, -0.1, 1.0000001, float("nan"), float("inf"), True, "0.9", None])
def test_retention_out_of_range_is_refused(retention: Any) -> None:
    with pytest.raises(BudgetError, match="retention must be a number above 0 and at most 1"):
        capacities_for_retention(random_curves(np.random.default_rng(0), 2, 4), retention)


def test_retention_out_of_reach_is_refused() -> None:
    curves = np.array([[0.0, 0.5, 1.0], [0.0, 0.5, 1.0]])
    with pytest.raises(
        BudgetError, match=r"retention of 0\.9 is out of reach: with every layer at its cap it is 0\.75"
    ):
        capacities_for_retention(curves, 0.9, caps=[1, 2])
