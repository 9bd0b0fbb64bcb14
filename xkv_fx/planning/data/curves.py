"""Retention curves: the share of a layer's attention mass that prefill keeps, for every capacity.

A curve R of a prompt of n tokens has n + 1 points: R[c] belongs to c slots per KV head, R[0] = 0 and R[n] = 1.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int
from xkv_fx.policy import Policy


def retention_curve(scores: NDArray[np.floating[Any]], policy: Policy) -> NDArray[np.float64]:
    """R[c]: the share of one layer's attention mass that prefill keeps at capacity c, after the XKV paper, section 4.

    Always kept are the newest `policy.recent_for(c)` and the first `policy.sinks_for(c)` tokens; the slots that remain
    go to the highest scores among the rest, for each head on its own. A larger capacity keeps what a smaller one does,
    so R never falls. (XKV arXiv 2412.05896 selects by score alone, after SnapKV, arXiv 2404.14469; forced tokens are
    ours, since the capacity here holds all of a layer's slots.)

    Args:
        scores: float32 or float64 `[kv_heads, n]`, finite and not negative; one prompt, oldest token first.
        policy: which tokens are always kept.

    Returns:
        float64 `[n + 1]`; `c / n` where all scores are zero.

    Raises:
        BudgetError: another shape or dtype, or a score that is NaN, infinite or negative.
    """
    _check_scores(scores)
    tokens = scores.shape[1]
    highest = float(scores.max())
    if highest == 0.0:
        even: NDArray[np.float64] = np.arange(tokens + 1) / tokens
        return even
    share = np.ldexp(scores.astype(np.float64), -math.frexp(highest)[1])  # exact; sums neither overflow nor vanish

    recent, sinks = _always_kept(policy, tokens)
    chosen = np.arange(tokens + 1) - recent - sinks
    per_token = share.sum(0)
    mass = _sums(per_token[::-1])[recent] + _sums(per_token)[sinks]

    never_forced = np.sort(share[:, sinks[-1] : tokens - recent[-1]])[:, ::-1]
    for start, stop in _runs(recent, sinks):
        most = int(chosen[stop - 1])
        if most == 0:
            continue
        later_a_sink = share[:, sinks[start] : sinks[-1]]
        later_recent = share[:, tokens - recent[-1] : tokens - recent[start]]
        ranked = never_forced[:, :most]
        if later_a_sink.size or later_recent.size:
            ranked = np.sort(np.concatenate((ranked, later_a_sink, later_recent), 1))[:, ::-1][:, :most]
        mass[start:stop] += _sums(ranked.sum(0))[chosen[start:stop]]

    kept: NDArray[np.float64] = np.maximum.accumulate(np.minimum(mass / mass[-1], 1.0))
    return kept


def _check_scores(scores: NDArray[np.floating[Any]]) -> None:
    if not isinstance(scores, np.ndarray) or scores.dtype not in (np.float32, np.float64):
        raise BudgetError(f"scores must be a float32 or float64 array; got {getattr(scores, 'dtype', type(scores))}")
    if scores.ndim != 2 or 0 in scores.shape:
        raise BudgetError(f"scores must be [kv_heads, n], both at least 1; got shape {scores.shape}")
    lowest, highest = float(scores.min()), float(scores.max())  # both are NaN if any score is
    if np.isnan(lowest):
        raise BudgetError("scores hold NaN; was the model run in a dtype that overflows?")
    if np.isinf(highest) or np.isinf(lowest):
        raise BudgetError("scores hold an infinity; was the model run in a dtype that overflows?")
    if lowest < 0:
        raise BudgetError(f"scores hold the negative value {lowest}; a share of mass needs scores of at least 0")


def _always_kept(policy: Policy, tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each capacity 0 .. tokens, how many of the newest and of the first tokens are always kept."""
    recent = np.full(tokens + 1, policy.recent_for(tokens), dtype=np.int64)
    sinks = np.full(tokens + 1, policy.sinks_for(tokens), dtype=np.int64)
    recent[0] = sinks[0] = 0
    settled = 1
    while settled < tokens and (policy.recent_for(settled), policy.sinks_for(settled)) != (recent[-1], sinks[-1]):
        recent[settled], sinks[settled] = policy.recent_for(settled), policy.sinks_for(settled)
        settled += 1  # both counts only grow, so they are settled once they have their last values
    return recent, sinks


def _runs(*counts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """The longest ranges of capacities over which all counts are the same."""
    changes = np.flatnonzero(np.any([np.diff(count) != 0 for count in counts], axis=0)) + 1
    edges = [0, *changes.tolist(), len(counts[0])]
    yield from itertools.pairwise(edges)


def _sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of the first 0, 1, ... values."""
    return np.concatenate(([0.0], np.cumsum(values)))


def rescale(curve: NDArray[np.floating[Any]], context: int) -> NDArray[np.float64]:
    """The curve for another prompt length: linear interpolation on the share c / length of tokens kept.

    Args:
        curve: `[..., length + 1]`.
        context: the new length.

    Returns:
        float64 `[..., context + 1]`; the first and last points are kept exactly.

    Raises:
        BudgetError: a curve of fewer than two points, or a context below 1.
    """
    length = curve.shape[-1] - 1 if curve.ndim else 0
    if length < 1:
        raise BudgetError("a curve needs a point for 0 slots and one for each token; got fewer than two points")
    if not is_int(context) or context < 1:
        raise BudgetError(f"context must be a whole number of at least 1; got {context!r}")
    if context == length:
        return curve.astype(np.float64)
    left, weight = _neighbours(length, context)
    low, high = curve[..., left].astype(np.float64), curve[..., left + 1].astype(np.float64)
    rescaled: NDArray[np.float64] = low * (1.0 - weight) + high * weight
    return rescaled


@functools.lru_cache(maxsize=2)  # all layers ask for the same
def _neighbours(length: int, context: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For 0 .. `context`, the point of 0 .. `length` before it on the share of tokens kept, and how far behind."""
    scaled = np.arange(context + 1) * length
    left = np.minimum(scaled // context, length - 1)
    return left, (scaled - left * context) / context


def concave_gains(curve: NDArray[np.float64], points: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """What each further token adds on the least concave curve that is nowhere below `curve`.

    A measured curve is concave but for the tokens that are kept whatever their score, so its best plan is found on
    that majorant. Pooling adjacent steps until none is larger than the one before gives its slopes.

    Args:
        curve: `[length + 1]`, finite and non-decreasing.
        points: the capacities that are allowed, int64 `[points]`, ascending: the curve is looked at there only. All of
            them by default.

    Returns:
        float64 `[points - 1]`, exactly non-increasing: the slope from each point to the next.
    """
    if points is None:
        return _pooled(np.diff(curve))
    widths = np.diff(points)
    return _pooled(np.diff(curve[points]) / widths, widths)


def _pooled(steps: NDArray[np.float64], weights: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    pooled: NDArray[np.float64] = isotonic_regression(steps, weights=weights, increasing=False).x
    return pooled


def shape_of(curves: NDArray[np.floating[Any]]) -> tuple[int, int]:
    """Layers and context of curves `[layers, context + 1]`.

    Raises:
        BudgetError: another shape, or not floats.
    """
    if not isinstance(curves, np.ndarray) or curves.dtype.kind != "f":
        raise BudgetError(f"curves must be an array of floats; got {getattr(curves, 'dtype', type(curves))}")
    if curves.ndim != 2 or curves.shape[0] < 1 or curves.shape[1] < 2:
        raise BudgetError(f"curves must be [layers, context + 1] with at least one layer and token; got {curves.shape}")
    return curves.shape[0], curves.shape[1] - 1


def checked_curves(curves: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """`[layers, context + 1]` curves in float64 that never fall, or the reason why these cannot be used.

    They are the given ones, not a copy, where these are so already.

    Raises:
        BudgetError: another shape, NaN or an infinity, or a curve that falls by more than rounding explains.
    """
    shape_of(curves)
    tolerance = 8 * float(np.finfo(curves.dtype).eps)
    checked: NDArray[np.float64] = curves.astype(np.float64, copy=False)
    for layer, curve in enumerate(checked):
        steps = np.diff(curve)  # one layer fits in a core's own cache, all of them may be gigabytes
        if steps.min() >= 0 and np.isfinite(curve[[0, -1]]).all():
            continue
        if not np.isfinite(curve).all():
            raise BudgetError(f"the curve of layer {layer} holds NaN or an infinity")
        if steps.min() < -tolerance * np.abs(curve).max():
            where = int(steps.argmin())
            raise BudgetError(f"the curve of layer {layer} falls from {where} to {where + 1} slots; it may only rise")
        if checked is curves:
            checked = checked.copy()
        checked[layer] = np.maximum.accumulate(curve)
    return checked


def mean_retention(curves: NDArray[np.floating[Any]], capacities: NDArray[np.int64] | Sequence[int]) -> float:
    """The mean over layers of the curves `[layers, context + 1]` at the capacities `[layers]`."""
    return float(curves[np.arange(len(curves)), np.asarray(capacities)].mean(dtype=np.float64))
