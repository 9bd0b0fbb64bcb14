"""Curves from a few measured divergences."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from xkv_fx.planning.data.hull import gain_curve, lower_hull

POINTS = st.lists(st.floats(0, 10), min_size=2, max_size=8)


@given(POINTS)
def test_the_hull_is_the_largest_convex_curve_below_the_points(values: list[float]) -> None:
    x, y = np.square(np.arange(len(values), dtype=np.float64)), np.array(values)
    corners = lower_hull(x, y)
    assert corners[0] == 0
    assert corners[-1] == len(values) - 1
    found = np.interp(x, x[corners], y[corners])
    for place in range(len(values)):
        lines = [y[place]] + [
            y[a] + (y[b] - y[a]) * (x[place] - x[a]) / (x[b] - x[a])
            for a, b in itertools.combinations(range(len(values)), 2)
            if a <= place <= b
        ]
        np.testing.assert_allclose(found[place], min(lines), atol=1e-9)


@given(POINTS, st.integers(1, 200))
def test_gains_rise_ever_more_slowly_to_what_full_capacity_is_worth(values: list[float], held: int) -> None:
    shares = np.linspace(0.1, 0.8, len(values))
    gains = gain_curve(shares, np.array(values), held)
    assert gains.shape == (held + 1,)
    assert gains[0] == 0
    assert (np.diff(gains) >= -1e-12).all()


def test_convex_points_lie_on_the_curve() -> None:
    shares, kl = np.array([0.1, 0.25, 0.5]), np.array([1.0, 0.3, 0.05])
    gains = gain_curve(shares, kl, 100)
    np.testing.assert_allclose(gains[-1] - gains[[10, 25, 50]], kl)
    assert gains[-1] - gains[0] > kl[0], "less than was measured costs more"
