"""How certain a comparison of two means over the same prompts is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

RESAMPLES = 10_000
SEED = 0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A comparison of two means over the same prompts, with its paired 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float


def ratio_of_means(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], resamples: int = RESAMPLES, seed: int = SEED
) -> Estimate:
    """`mean(ours) / mean(theirs)` of the same prompts, with the 95 % percentile interval of a paired bootstrap.

    Prompts are drawn with replacement, both values of a prompt together (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13). Where both means are 0 the ratio is 1.

    Args:
        ours, theirs: float64 `[prompts]`, not negative.
    """
    return _estimate(_ratio_of_means, ours, theirs, resamples, seed)


def difference_of_means(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], resamples: int = RESAMPLES, seed: int = SEED
) -> Estimate:
    """`mean(ours) - mean(theirs)` of the same prompts, with an interval as `ratio_of_means` gives."""
    return _estimate(_mean_difference, ours, theirs, resamples, seed)


def _estimate(
    compare: Callable[..., Any], ours: NDArray[np.float64], theirs: NDArray[np.float64], resamples: int, seed: int
) -> Estimate:
    value = float(compare(ours, theirs))
    if len(ours) == 1:  # every draw is that prompt again
        return Estimate(value, value, value)
    found = bootstrap(
        (ours, theirs), compare, n_resamples=resamples, vectorized=True, paired=True, method="percentile", rng=seed
    )
    return Estimate(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def _ratio_of_means(ours: NDArray[np.float64], theirs: NDArray[np.float64], axis: int = -1) -> Any:
    over, under = ours.mean(axis), theirs.mean(axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(under > 0, over / under, np.where(over > 0, np.inf, 1.0))


def _mean_difference(ours: NDArray[np.float64], theirs: NDArray[np.float64], axis: int = -1) -> Any:
    return (ours - theirs).mean(axis)
