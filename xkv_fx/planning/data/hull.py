"""From a few measured divergences to a curve for every capacity."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def gain_curve(shares: NDArray[np.float64], kl: NDArray[np.float64], held: int) -> NDArray[np.float64]:
    """What a layer gains by each capacity: `KL(0) - KL(c)` for c = 0 .. `held`, non-decreasing. It is concave between
    its corners, but not at a sharp corner; there the solver uses the least concave curve above it.

    The measured points, and 0 at full capacity, are replaced by their lower convex hull: a plan never ends between two
    capacities of which a third is the better value. Between corners of the hull KL is taken to fall linearly with the
    logarithm of c, as a convex curve through them would, so that capacities do not pile up at the measured points.
    Below the first point KL goes on rising at the slope that it has there.

    Args:
        shares: measured capacities as shares of `held`, ascending, between 0 and 1, `[grid]`.
        kl: mean divergences, nats, not negative, `[grid]`.
        held: the most tokens that the layer can hold.

    Returns:
        float64 `[held + 1]`.
    """
    curve = kl_curve(np.append(shares, 1.0), np.append(kl, 0.0), held)
    gains: NDArray[np.float64] = curve[0] - curve
    return gains


def kl_curve(shares: NDArray[np.float64], kl: NDArray[np.float64], held: int) -> NDArray[np.float64]:
    """The divergence at each capacity c = 0 .. `held`, from those at some; see `gain_curve`.

    Args:
        shares: ascending, the last one 1, `[points]`, at least two.
        kl: of each, nats, `[points]`.
    """
    corners = lower_hull(shares, kl)
    tokens = np.arange(held + 1) / held
    logs = np.log(np.maximum(tokens, shares[0]))
    curve = np.interp(logs, np.log(shares[corners]), kl[corners])
    first, second = corners[0], corners[1]
    slope = (kl[first] - kl[second]) / (np.log(shares[second]) - np.log(shares[first])) / shares[first]
    curve += np.maximum(shares[0] - tokens, 0.0) * slope
    return np.asarray(curve, dtype=np.float64)


def lower_hull(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the corners of the lower convex hull of points with ascending x, both ends included."""
    corners: list[int] = []
    for point in range(len(x)):
        while len(corners) >= 2:
            a, b = corners[-2], corners[-1]
            if (y[b] - y[a]) * (x[point] - x[a]) < (y[point] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(point)
    return np.array(corners, dtype=np.int64)
