"""Retention curves against a brute force that selects at every capacity; rescaling; the concave majorant."""

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
from xkv_fx.planning.data.curves import checked_curves, concave_gains, rescale, retention_curve
from xkv_fx.policy import Policy

Array = NDArray[Any]

policies = st.builds(
    Policy,
    recent=st.none() | st.integers(1, 40),
    sinks=st.sampled_from([0, 0, 1, 3, 20, 1000]),
    eviction=st.just("ring"),
)


def kept_tokens(scores: Array, capacity: int, policy: Policy) -> set[int]:
    """What one head keeps: the forced tokens, then the highest scores among the rest."""
    tokens = len(scores)
    recent, sinks = policy.recent_for(capacity), policy.sinks_for(capacity)
    kept = {*range(sinks), *range(tokens - recent, tokens)}
    rest = sorted(set(range(tokens)) - kept, key=lambda token: (-scores[token], token))
    return kept | set(rest[: capacity - recent - sinks])


def brute_force(scores: Array, policy: Policy) -> Array:
    tokens = scores.shape[1]
    curve = np.zeros(tokens + 1)
    for capacity in range(1, tokens + 1):
        kept = sum(float(head[sorted(kept_tokens(head, capacity, policy))].sum()) for head in scores)
        curve[capacity] = kept / float(scores.sum())
    return curve


def random_scores(seed: int, heads: int, tokens: int) -> Array:
    """Scores with ties, zeros and a heavy tail."""
    rng = np.random.default_rng(seed)
    scores = rng.exponential(size=(heads, tokens)) ** rng.integers(1, 5)
    scores[rng.random(scores.shape) < 0.3] = 0.0
    scores[:, rng.integers(0, tokens, size=tokens // 3)] = 0.5
    scores[0, 0] = 1.0  # not all of them zero
    return scores


# Retention


@examples(60)
@given(policies, st.integers(1, 4), st.integers(1, 90), st.integers(0, 2**32))
def test_retention_equals_selecting_at_every_capacity(policy: Policy, heads: int, tokens: int, seed: int) -> None:
    scores = random_scores(seed, heads, tokens)
    curve = retention_curve(scores, policy)
    np.testing.assert_allclose(curve, brute_force(scores, policy), rtol=0, atol=1e-12)
    assert curve[0] == 0.0
    assert curve[-1] == 1.0
    assert (np.diff(curve) >= 0).all()


@pytest.mark.parametrize(
    "policy", [Policy(), Policy(sinks=4), Policy(sinks=200), Policy(recent=300, sinks=9), Policy(recent=1)], ids=repr
)
def test_retention_where_recent_grows_to_its_limit(policy: Policy) -> None:
    """`recent` is settled from 256 slots on; the curve must hold before, at and after it."""
    scores = random_scores(7, 2, 330)
    np.testing.assert_allclose(retention_curve(scores, policy), brute_force(scores, policy), rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", [Policy(), Policy(sinks=3), Policy(recent=5, sinks=70)], ids=repr)
def test_sets_of_kept_tokens_are_nested(policy: Policy) -> None:
    scores = random_scores(3, 1, 300)[0]
    kept = [kept_tokens(scores, capacity, policy) for capacity in range(1, 301)]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(kept))


def test_forced_tokens_are_part_of_the_capacity() -> None:
    scores = np.array([[9.0, 0.0, 0.0, 1.0]])
    assert retention_curve(scores, Policy(recent=1)).tolist() == [0.0, 0.1, 1.0, 1.0, 1.0]
    assert retention_curve(scores, Policy(recent=2)).tolist() == [0.0, 0.1, 0.1, 1.0, 1.0]
    assert retention_curve(scores, Policy(recent=1, sinks=1)).tolist() == [0.0, 0.1, 1.0, 1.0, 1.0]


def test_heads_choose_their_own_tokens_and_count_by_their_mass() -> None:
    scores = np.array([[6.0, 0.0, 0.0, 0.0], [0.0, 2.0, 2.0, 0.0]])
    assert retention_curve(scores, Policy(recent=1)).tolist() == [0.0, 0.0, 0.8, 1.0, 1.0]


def test_no_mass_at_all_counts_every_token_alike() -> None:
    assert retention_curve(np.zeros((2, 4), dtype=np.float32), Policy()).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e300])
def test_scale_of_scores_does_not_matter(scale: float) -> None:
    scores = np.full((3, 10), scale)
    assert retention_curve(scores, Policy()).tolist() == pytest.approx(np.arange(11) / 10)


def test_all_mass_kept_is_exactly_one() -> None:
    scores = random_scores(5, 4, 500)
    scores[:, 100:] = 0.0
    curve = retention_curve(scores, Policy())
    assert curve[164] == 1.0
    assert (curve <= 1.0).all()


def test_float32_and_views_are_taken_and_left_alone() -> None:
    scores = random_scores(1, 6, 80)[::2, ::-1].astype(np.float32)
    before = scores.copy()
    np.testing.assert_allclose(retention_curve(scores, Policy()), brute_force(scores, Policy()), rtol=0, atol=1e-6)
    assert (scores == before).all()


def test_long_prompts_take_few_sorts(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_sizes: list[int] = []
    real_sort = np.sort

    def counting_sort(values: Array, *args: Any) -> Array:
        sorted_sizes.append(values.size)
        return real_sort(values, *args)

    monkeypatch.setattr(np, "sort", counting_sort)
    scores = np.random.default_rng(0).random((2, 20_000))
    retention_curve(scores, Policy())
    assert sum(sorted_sizes) < 3 * scores.size
    assert len(sorted_sizes) < 100


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.array([[1.0, np.nan]]), "NaN"),
        (np.array([[1.0, np.inf]]), "infinity"),
        (np.array([[1.0, -np.inf]]), "infinity"),
        (np.array([[1.0, -1e-9]]), "negative value -1e-09"),
        (np.ones(3), r"\[kv_heads, n\].*\(3,\)"),
        (np.ones((2, 0)), r"\(2, 0\)"),
        (np.ones((0, 2)), r"\(0, 2\)"),
        (np.ones((1, 2), dtype=np.int64), "int64"),
        (np.ones((1, 2), dtype=np.float16), "float16"),
        ([[1.0]], "list"),
    ],
)
def test_scores_that_cannot_be_used_are_refused(scores: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        retention_curve(scores, Policy())


# Rescaling


@examples(40)
@given(st.integers(1, 60), st.integers(1, 200), st.integers(0, 2**32))
def test_rescale_interpolates_on_the_share_kept(length: int, context: int, seed: int) -> None:
    curve = np.sort(np.random.default_rng(seed).random((2, length + 1)))
    expected = [np.interp(np.arange(context + 1) / context, np.arange(length + 1) / length, row) for row in curve]
    rescaled = rescale(curve, context)
    np.testing.assert_allclose(rescaled, expected, rtol=0, atol=1e-12)
    assert (rescaled[:, [0, -1]] == curve[:, [0, -1]]).all()


def test_rescale_to_the_same_length_changes_nothing() -> None:
    curve = np.sort(np.random.default_rng(0).random(50)).astype(np.float32)
    same = rescale(curve, 49)
    assert (same == curve).all()
    assert same.dtype == np.float64


@pytest.mark.parametrize("context", [0, -1, 2.0, True, None])
def test_rescale_refuses_a_context_that_is_no_length(context: Any) -> None:
    with pytest.raises(BudgetError, match="context"):
        rescale(np.array([0.0, 1.0]), context)


@pytest.mark.parametrize("curve", [np.array([1.0]), np.array(1.0), np.array([])])
def test_rescale_refuses_a_curve_without_tokens(curve: Array) -> None:
    with pytest.raises(BudgetError, match="fewer than two points"):
        rescale(curve, 4)


# The concave majorant


def highest_chord(curve: Array) -> Array:
    """At each point the highest of all lines between two points of the curve."""
    majorant = curve.astype(np.float64).copy()
    for left in range(len(curve)):
        for right in range(left + 1, len(curve)):
            line = np.linspace(curve[left], curve[right], right - left + 1)
            majorant[left : right + 1] = np.maximum(majorant[left : right + 1], line)
    return majorant


def majorant_of(curve: Array) -> Array:
    """The concave majorant, from the curve's gains."""
    return np.concatenate((curve[:1], curve[0] + np.cumsum(concave_gains(curve))))


@examples(60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_majorant_is_the_highest_chord(steps: list[int]) -> None:
    curve = np.cumsum([0, *steps]) / 7
    np.testing.assert_allclose(majorant_of(curve), highest_chord(curve), rtol=0, atol=1e-12)
    assert (np.diff(concave_gains(curve)) <= 0).all()


@examples(60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.data())
def test_majorant_of_some_points_is_the_highest_chord_between_them(steps: list[int], data: Any) -> None:
    curve = np.cumsum([0, *steps]) / 7
    inner = data.draw(st.sets(st.integers(0, len(steps))))
    points = np.array(sorted({0, len(steps), *inner}))
    gains = concave_gains(curve, points)
    straight = np.interp(np.arange(len(curve)), points, curve[points])
    majorant = np.concatenate(([0.0], np.cumsum(gains * np.diff(points))))
    np.testing.assert_allclose(majorant, highest_chord(straight)[points], rtol=0, atol=1e-12)
    assert (np.diff(gains) <= 0).all()


def bent_at_the_end() -> Array:
    curve: Array = np.sqrt(np.arange(5001.0))
    curve[-1] = 100.0  # pulls the hull away from the curve point by point
    return curve


@pytest.mark.parametrize(
    "curve",
    [
        bent_at_the_end(),
        np.round(np.sqrt(np.arange(5001.0)), 1),
        np.sqrt(np.arange(5001.0)).astype(np.float32),
        np.maximum(np.sqrt(np.arange(5001.0)), 30.0),
        np.concatenate((np.arange(20) / 1e3, np.sqrt(np.arange(1.0, 5000.0)))),
        np.cumsum(np.random.default_rng(0).random(5000)),
        np.arange(5001.0) ** 2,
        np.zeros(5001),
    ],
    ids=["end", "stairs", "float32", "flat-start", "forced-start", "random-walk", "convex", "zero"],
)
def test_majorant_of_long_curves(curve: Array) -> None:
    """Concave, nowhere below, and touching wherever its slope changes: that is the least concave majorant."""
    curve = checked_curves(curve[None])[0]
    gains, majorant = concave_gains(curve), majorant_of(curve)
    near = 1e-9 * curve[-1]
    assert (np.diff(gains) <= 0).all()
    assert (majorant >= curve - near).all()
    touching = [*(np.flatnonzero(np.diff(gains)) + 1), 0, -1]
    np.testing.assert_allclose(majorant[touching], curve[touching], rtol=0, atol=near)


def test_concave_curve_is_its_own_majorant() -> None:
    scores = np.random.default_rng(0).random((2, 400))
    steps = -np.sort(-scores.sum(0))
    curve = np.concatenate(([0.0], np.cumsum(steps)))
    np.testing.assert_allclose(concave_gains(curve), steps, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        (np.array([[0.0, 0.5, 0.4, 1.0]]), "layer 0 falls from 1 to 2"),
        (np.array([[0.0, 1.0], [0.0, np.nan]]), "layer 1 holds NaN"),
        (np.array([[0.0, np.inf]]), "layer 0 holds NaN or an infinity"),
        (np.array([0.0, 1.0]), r"\[layers, context \+ 1\]"),
        (np.array([[1.0]]), r"\(1, 1\)"),
        (np.zeros((0, 3)), r"\(0, 3\)"),
        (np.array([[0, 1]]), "int64"),
        ([[0.0, 1.0]], "list"),
    ],
)
def test_curves_that_cannot_be_used_are_refused(curves: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        checked_curves(curves)


def test_falls_that_rounding_explains_are_flattened() -> None:
    curves = np.array([[0.0, 1.0 + 2e-16, 1.0]])
    assert (np.diff(checked_curves(curves)) >= 0).all()


@pytest.mark.parametrize("points", [2048, 2049, 2100, 6401])
@pytest.mark.parametrize("kind", range(3))
def test_long_curves_have_the_majorant_of_all_their_points(points: int, kind: int) -> None:
    generator = np.random.default_rng(kind)
    steps = [
        generator.random(points - 1) ** 4,
        np.exp(-np.arange(points - 1) / 300) + 0.1 * generator.random(points - 1),
        (generator.random(points - 1) < 0.05) * 1.0,
    ][kind]
    curve = np.concatenate(([0.0], steps.cumsum()))
    kept: list[int] = []  # one point after another, as in any book on convex hulls
    for point, value in enumerate(curve):
        while len(kept) >= 2 and (curve[kept[-1]] - curve[kept[-2]]) * (point - kept[-2]) <= (
            value - curve[kept[-2]]
        ) * (kept[-1] - kept[-2]):
            kept.pop()
        kept.append(point)
    expected = np.interp(np.arange(points), kept, curve[kept])
    assert (np.diff(concave_gains(curve)) <= 0).all()
    np.testing.assert_allclose(majorant_of(curve), expected, rtol=1e-9)
