"""Other papers' ways to share a total among layers, for comparison at equal bytes."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xkv_fx.planning.data.curves import checked_curves
from xkv_fx.planning.solve.allocators import register_allocator, within_limits
from xkv_fx.planning.solve.limits import Limits

# PyramidKV's beta: how many times the mean the top layer's budget goes into (its reference code's default).
PYRAMID_BETA = 20
# SqueezeAttention's p: what the least important group of layers keeps of a uniform budget.
SQUEEZE_SHARE = 0.35
SQUEEZE_GROUPS = 3


@register_allocator("pyramid")
@within_limits
def pyramid(curves: NDArray[np.floating[Any]], total: int, limits: Limits) -> NDArray[np.int64]:
    """Budgets that fall linearly from the first layer to the last, whatever was measured (PyramidKV, arXiv 2406.02069,
    section 4.2): the last layer gets 1 / beta of the mean, the first 2 - 1 / beta of it."""
    lowest = 1 / PYRAMID_BETA
    return proportional(np.linspace(2 - lowest, lowest, limits.layers), total, limits)


@register_allocator("maxmin", reads="retention")
@within_limits
def maxmin(curves: NDArray[np.floating[Any]], total: int, limits: Limits) -> NDArray[np.int64]:
    """The plan whose worst layer keeps most: every layer keeps at least the same share of its attention mass, the
    largest that the total allows, found by bisection (PrefixKV, arXiv 2412.03409, section 3.3). What is left raises the
    layers that keep least, one after another."""
    curves = checked_curves(curves)

    def keeping(share: float) -> NDArray[np.int64]:
        return np.array([_capacity(curve, share, limits, layer) for layer, curve in enumerate(curves)])

    shares = np.unique(curves)
    enough = bisect_left(range(len(shares)), True, key=lambda index: int(keeping(float(shares[index])).sum()) > total)
    capacities = keeping(float(shares[enough - 1])) if enough else limits.lows.copy()
    left = total - int(capacities.sum())
    while left:
        kept = np.where(capacities < limits.caps, curves[np.arange(limits.layers), capacities], np.inf)
        layer = int(kept.argmin())
        wanted = max(_capacity(curves[layer], np.nextafter(kept[layer], np.inf), limits, layer), capacities[layer] + 1)
        more = min(left, int(wanted - capacities[layer]))
        capacities[layer] += more
        left -= more
    return capacities


@register_allocator("entropy", statistic="preference")
@within_limits
def entropy(
    curves: NDArray[np.floating[Any]], total: int, limits: Limits, *, preference: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Budgets in proportion to how widely a layer's attention spreads and how much it shifts from query to query
    (CAKE, arXiv 2503.12491, section 4.1; both exponents 1, where the paper tunes them for each model)."""
    return proportional(preference, total, limits)


@register_allocator("squeeze", statistic="similarity")
@within_limits
def squeeze(
    curves: NDArray[np.floating[Any]], total: int, limits: Limits, *, similarity: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Layers in three clusters by how little their attention changes the hidden state; those that change it least keep
    0.35 of a uniform budget, and all others share what that frees (SqueezeAttention, arXiv 2404.04793, section 3)."""
    groups = clusters(similarity, SQUEEZE_GROUPS)
    least = groups == groups.max()
    weights = np.where(least, SQUEEZE_SHARE, 1.0)
    if not least.all():
        weights[~least] = (len(least) - SQUEEZE_SHARE * least.sum()) / (~least).sum()
    return proportional(weights, total, limits)


def proportional(weights: NDArray[np.float64], total: int, limits: Limits) -> NDArray[np.int64]:
    """Capacities in proportion to weights, as far as floors and caps allow, in blocks, of exactly `total`.

    Args:
        weights: float64 `[layers]`, not negative, not all 0.
        total: what the capacities add up to.
        limits: for that total.
    """
    lows, caps, block = limits.lows, limits.caps, limits.multiple
    weights = np.maximum(weights / weights.max(), 1e-12)

    def ideal(factor: float) -> NDArray[np.float64]:
        return np.clip(factor * weights, lows, caps)

    low, high = 0.0, float(caps.max()) * 1e12
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if ideal(middle).sum() <= total else (low, middle)
    wanted = ideal(low)
    capacities = np.where(wanted >= caps, caps, np.maximum(lows, np.floor(wanted / block).astype(np.int64) * block))
    left = total - int(capacities.sum())
    while left:
        lacking = np.where(capacities < caps, wanted - capacities, -np.inf)
        layer = int(lacking.argmax())
        more = min(left, block, int(caps[layer] - capacities[layer]))
        capacities[layer] += more
        left -= more
    return capacities


def clusters(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The best split of numbers into at most `count` ranges, by the sum of squared distances to each range's mean.

    On a line k-means has an exact answer: dynamic programming over the sorted values.

    Returns:
        the range of each value, int64, 0 for the smallest values.
    """
    order = np.argsort(values, kind="stable")
    x = values[order]
    count = min(count, len(np.unique(x)))
    sums, squares = (np.concatenate(([0.0], np.cumsum(part))) for part in (x, x * x))

    def cost(start: int, stop: int) -> float:
        return float(squares[stop] - squares[start] - (sums[stop] - sums[start]) ** 2 / (stop - start))

    best: list[tuple[float, tuple[int, ...]]] = [(cost(0, stop) if stop else 0.0, (0,)) for stop in range(len(x) + 1)]
    for groups in range(2, count + 1):
        best = [
            min(
                ((best[cut][0] + cost(cut, stop), (*best[cut][1], cut)) for cut in range(groups - 1, stop)),
                default=(np.inf, ()),
            )
            for stop in range(len(x) + 1)
        ]
    found = np.zeros(len(x), dtype=np.int64)
    for group, start in enumerate(best[-1][1]):
        found[order[start:]] = group
    return found


def _capacity(curve: NDArray[np.float64], share: float, limits: Limits, layer: int) -> int:
    """The fewest slots of a layer that keep `share`, in whole blocks and within its limits."""
    needed = int(np.searchsorted(curve, share))
    blocks = -(-needed // limits.multiple) * limits.multiple
    return int(np.clip(blocks, limits.lows[layer], limits.caps[layer]))
