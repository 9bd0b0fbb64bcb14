"""Comparisons of means over the same prompts: what they come to, and how certain that is."""

from __future__ import annotations

import numpy as np
import pytest
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from xkv_fx.planning.measure.bootstrap import Estimate, difference_of_means, ratio_of_means


@examples(20)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=12), st.floats(0.1, 3))
def test_the_interval_is_paired(values: list[float], factor: float) -> None:
    theirs = np.array(values)
    ratio = ratio_of_means(theirs * factor, theirs, resamples=500)
    assert ratio.value == pytest.approx(factor)
    assert ratio.low == pytest.approx(factor)
    assert ratio.high == pytest.approx(factor), "what both plans share leaves no doubt about their ratio"


def test_the_interval_is_that_of_a_bootstrap_over_prompts() -> None:
    generator = np.random.default_rng(3)
    ours, theirs = generator.gamma(1, 1, 30), generator.gamma(1, 2, 30)
    found = ratio_of_means(ours, theirs)
    assert found == ratio_of_means(ours, theirs), "the seed is fixed"
    draws = [generator.integers(30, size=30) for _ in range(20_000)]
    low, high = np.percentile([ours[d].mean() / theirs[d].mean() for d in draws], (2.5, 97.5))
    assert found.low == pytest.approx(low, rel=0.03)
    assert found.high == pytest.approx(high, rel=0.03)


def test_nothing_lost_by_either_is_a_tie() -> None:
    assert ratio_of_means(np.zeros(3), np.zeros(3)) == Estimate(1.0, 1.0, 1.0)


@pytest.mark.parametrize("prompts", [2, 12, 30, 97])
def test_figures_are_those_that_version_0_1_gave(prompts: int) -> None:
    """Plans and docs hold figures that were drawn so."""
    generator = np.random.default_rng(prompts)
    ours, theirs = generator.gamma(1, 1, prompts), generator.gamma(1, 2, prompts)
    drawn = np.random.default_rng(0).integers(prompts, size=(10_000, prompts))
    ratio, difference = ratio_of_means(ours, theirs), difference_of_means(ours, theirs)
    low, high = np.percentile(ours[drawn].mean(1) / theirs[drawn].mean(1), (2.5, 97.5))
    assert (ratio.low, ratio.high) == pytest.approx((low, high), rel=1e-12)
    assert ratio.value == pytest.approx(ours.mean() / theirs.mean(), rel=1e-12)
    low, high = np.percentile((ours - theirs)[drawn].mean(1), (2.5, 97.5))
    assert (difference.low, difference.high) == pytest.approx((low, high), rel=1e-12)
    assert difference.value == pytest.approx(ours.mean() - theirs.mean(), rel=1e-12)


def test_a_single_prompt_is_certain_of_itself() -> None:
    assert ratio_of_means(np.array([1.0]), np.array([4.0])) == Estimate(0.25, 0.25, 0.25)
    assert difference_of_means(np.array([1.0]), np.array([4.0])) == Estimate(-3.0, -3.0, -3.0)
