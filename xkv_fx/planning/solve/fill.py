"""The solver: which layer gets the next token, for all tokens at once.

Every curve is concave (or replaced by its concave majorant), so the best plan takes the tokens with the largest
marginal gains over all layers: one pooled top-N (XKV arXiv 2412.05896, section 4, constraints A and B). Within a layer
the gains are sorted already, so the threshold between taken and not taken is bisected, with no loop over tokens.

Plans are nested: blocks of tokens have one order, best gain per token first, lower layers first among equals, and a
larger plan goes further along it.
"""

from __future__ import annotations

import dataclasses
import numbers
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xkv_fx.errors import BudgetError
from xkv_fx.planning.data.curves import checked_curves, concave_gains, mean_retention, shape_of
from xkv_fx.planning.solve.limits import Limits, make_limits

Gains = NDArray[np.floating[Any]]


def fill_by_gain(
    gains: Gains, total: int, floor: int = 1, caps: ArrayLike | None = None, multiple: int = 1
) -> NDArray[np.int64]:
    """The capacities with the largest sum of gains among those that add up to `total`.

    With `multiple` 1 this is the exact optimum; of equal gains the lower layer's comes first. Otherwise tokens come in
    blocks of `multiple`, the last of a layer ending at its cap, by gain per token; what is left of the total goes to
    the layer that would get the next block.

    Args:
        gains: float32 or float64 `[layers, context]`, not negative; entry c is what the token after c others adds,
            non-increasing along tokens.
        total: the sum of the capacities, exact.
        floor: the fewest slots of every layer; a layer whose cap is lower gets its cap.
        caps: the most slots of each layer, `[layers]`; `context` by default.
        multiple: tokens in a block. Where `total` cannot give each layer its floor in whole blocks, the block is the
            largest power of two that divides `multiple` and is small enough, and no layer gets more than its floor in
            the next larger blocks: plans are nested in those of larger totals, whatever their blocks.

    Returns:
        int64 `[layers]`.

    Raises:
        BudgetError: a total below the floors or above the caps, bounds out of range, or gains that are NaN, infinite,
            negative, or rise by more than rounding explains.
    """
    gains = _checked_gains(gains)
    limits = make_limits(gains.shape[0], gains.shape[1], floor, caps, multiple).for_total(total)
    return fill(make_blocks(gains, limits), total)


def capacities_for_total(
    curves: NDArray[np.floating[Any]],
    total: int,
    *,
    floor: int = 1,
    caps: ArrayLike | None = None,
    multiple: int = 1,
) -> NDArray[np.int64]:
    """The plan of exactly `total` tokens with the best mean retention, int64 `[layers]` (the paper's constraint A).

    Args:
        curves: retention `[layers, context + 1]`; where a curve is not concave its majorant decides.
        total, floor, caps, multiple: as in `fill_by_gain`.

    Raises:
        BudgetError: curves that are not finite or fall; and as in `fill_by_gain`.
    """
    curves = checked_curves(curves)
    limits = make_limits(*shape_of(curves), floor, caps, multiple).for_total(total)
    return fill(blocks_of_curves(curves, limits), total)


def capacities_for_retention(
    curves: NDArray[np.floating[Any]],
    retention: float,
    *,
    floor: int = 1,
    caps: ArrayLike | None = None,
    multiple: int = 1,
) -> NDArray[np.int64]:
    """The plan with the fewest tokens whose mean retention is at least `retention` (the paper's constraint B).

    Plans are those of `capacities_for_total`, in whole blocks; they are judged by the curves themselves, not by their
    majorants.

    Args:
        curves: retention `[layers, context + 1]`.
        retention: above 0 and at most 1.
        floor, caps, multiple: as in `fill_by_gain`; the block is never made smaller, since no total is asked for.

    Raises:
        BudgetError: a retention out of range or out of reach; bounds or curves as in `capacities_for_total`.
    """
    curves = checked_curves(curves)
    limits = make_limits(*shape_of(curves), floor, caps, multiple)
    check_retention(retention, mean_retention(curves, limits.caps))
    return _fewest(blocks_of_curves(curves, limits), lambda plan: mean_retention(curves, plan) >= retention)


def check_retention(retention: float, reachable: float) -> None:
    """Refuse a retention outside (0, 1], or above what full caps keep.

    Raises:
        BudgetError: as said.
    """
    if isinstance(retention, bool) or not isinstance(retention, numbers.Real) or not 0 < retention <= 1:
        raise BudgetError(f"retention must be a number above 0 and at most 1; got {retention!r}")
    if retention > reachable:
        raise BudgetError(f"a retention of {retention} is out of reach: with every layer at its cap it is {reachable}")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What can be taken from each layer, in blocks of tokens.

    Attributes:
        gains: float32 or float64 `[layers, blocks]`, not negative: a block's gain per token, or per byte,
            non-increasing along blocks.
        size: tokens in a block; a block that reaches beyond the layer's cap ends there.
        lows: the capacities to start from, int64 `[layers]`.
        caps: the capacities to end at, int64 `[layers]`: `Limits.tops`.
    """

    gains: Gains
    size: int
    lows: NDArray[np.int64]
    caps: NDArray[np.int64]

    def at_least(self, pattern: int) -> NDArray[np.int64]:
        """The capacities, `[layers]`, that take every block whose gain is at least a threshold.

        Args:
            pattern: the bits of the threshold. Of floats that are not negative, bits and values have the same order,
                so bisecting them is exact, in 31 steps for float32 and 63 for float64.
        """
        threshold = np.array(pattern, dtype=f"u{self.gains.dtype.itemsize}").view(self.gains.dtype)[()]
        smaller = np.array([row[::-1].searchsorted(threshold) for row in self.gains])
        taken: NDArray[np.int64] = np.clip((self.gains.shape[1] - smaller) * self.size, self.lows, self.caps)
        return taken

    @property
    def patterns(self) -> range:
        """The bits of every threshold from zero, which takes all, to infinity; what sorts after that takes nothing."""
        return range(int(np.array(np.inf, dtype=self.gains.dtype).view(f"u{self.gains.dtype.itemsize}")) + 1)


def make_blocks(gains: Gains, limits: Limits) -> Blocks:
    """Blocks of `limits.multiple` tokens from the gains `[layers, context]` of single ones."""
    size = limits.multiple
    if size > 1:
        layers, tokens = gains.shape
        whole = tokens // size
        means = np.zeros((layers, whole + 1), dtype=gains.dtype)
        gains[:, : whole * size].reshape(layers, whole, size).sum(2, out=means[:, :whole])
        means /= size
        for layer, cap in enumerate(limits.caps.tolist()):
            last, rest = divmod(cap, size)
            if rest:
                means[layer, last] = gains[layer, cap - rest : cap].sum() / rest
                means[layer, last:] = means[layer, max(last - 1, 0) : last + 1].min()  # rounding must not make it rise
        gains = means
    return Blocks(gains, size, limits.lows, limits.tops)


def blocks_of_curves(curves: NDArray[np.float64], limits: Limits) -> Blocks:
    """Blocks of `limits.multiple` tokens from checked curves `[layers, context + 1]`.

    What a curve does within a block is not looked at, since no capacity but the cap ends there.
    """
    size, (layers, context) = limits.multiple, shape_of(curves)
    gains = np.empty((layers, -(-context // size)))
    for layer, cap in enumerate(limits.caps.tolist()):
        points = np.minimum(np.arange(0, cap + size, size), cap)
        reached = len(points) - 1
        gains[layer, :reached] = concave_gains(curves[layer], points)
        gains[layer, reached:] = gains[layer, reached - 1]  # behind the cap, where nothing is taken
    return Blocks(gains, size, limits.lows, limits.tops)


def fill(blocks: Blocks, budget: int, price: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Take the best blocks, and the start of the next one, as long as they cost at most `budget`.

    Args:
        blocks: what to take from.
        budget: at least what `blocks.lows` cost.
        price: of a token of each layer, `[layers]`; 1 by default. Then the capacities add up to `budget`, or are the
            caps. With unequal prices something cheaper than the next block may still be affordable.

    Returns:
        the capacities, int64 `[layers]`.
    """
    price = np.ones_like(blocks.lows) if price is None else price
    pattern = bisect_left(blocks.patterns, True, key=lambda bits: int(blocks.at_least(bits) @ price) <= budget)
    capacities = blocks.at_least(pattern)
    if pattern == 0:
        return capacities
    left = budget - int(capacities @ price)
    for layer, tied in enumerate((blocks.at_least(pattern - 1) - capacities).tolist()):
        more = min(tied, left // int(price[layer]))
        capacities[layer] += more
        left -= more * int(price[layer])
    return capacities


def spread(blocks: Blocks, total: int) -> NDArray[np.int64]:
    """Capacities as equal as lows, caps and blocks allow, int64 `[layers]`; the best blocks of a last round are taken.

    Args:
        total: the sum of the capacities, at most that of the caps; where it is below that of the lows, they are it.
    """

    def filled(count: int) -> NDArray[np.int64]:
        capacities: NDArray[np.int64] = np.clip(count * blocks.size, blocks.lows, blocks.caps)
        return capacities

    # The round that fits in the total while the next does not, or the one before the last.
    last = blocks.gains.shape[1] - 1
    level = bisect_left(range(last), True, key=lambda count: int(filled(count + 1).sum()) > total)
    capacities = filled(level)
    left = max(0, total - int(capacities.sum()))
    best_first = np.argsort(-blocks.gains[:, level], kind="stable")
    room = (filled(level + 1) - capacities)[best_first]
    capacities[best_first] += np.clip(left - (np.cumsum(room) - room), 0, room)
    return capacities


def _fewest(blocks: Blocks, enough: Callable[[NDArray[np.int64]], bool]) -> NDArray[np.int64]:
    """The fewest of the best blocks that are enough, as capacities; all blocks together must be."""
    if enough(blocks.lows):
        return blocks.lows
    pattern = bisect_left(blocks.patterns, True, key=lambda bits: not enough(blocks.at_least(bits)))
    short, ample = blocks.at_least(pattern), blocks.at_least(pattern - 1)
    tied = -(-(ample - short) // blocks.size)

    def with_tied(count: int) -> NDArray[np.int64]:
        more = np.clip(count - (np.cumsum(tied) - tied), 0, tied)
        capacities: NDArray[np.int64] = np.minimum(short + more * blocks.size, ample)
        return capacities

    return with_tied(bisect_left(range(int(tied.sum())), True, key=lambda count: enough(with_tied(count))))


def _checked_gains(gains: Gains) -> Gains:
    """The gains, with rises that rounding explains flattened out.

    Rows are looked at one by one: each fits in a core's own cache, the whole may be gigabytes.
    """
    if not isinstance(gains, np.ndarray) or gains.dtype not in (np.float32, np.float64):
        raise BudgetError(f"gains must be a float32 or float64 array; got {getattr(gains, 'dtype', type(gains))}")
    if gains.ndim != 2 or 0 in gains.shape:
        raise BudgetError(f"gains must be [layers, context], both at least 1; got shape {gains.shape}")
    checked = gains
    for layer, row in enumerate(gains):
        sorted_already = bool((row[1:] <= row[:-1]).all())
        if sorted_already and row[-1] >= 0 and np.isfinite(row[0]):
            continue
        if not np.isfinite(row).all():
            raise BudgetError(f"the gains of layer {layer} hold NaN or an infinity")
        if row.min() < 0:
            raise BudgetError(f"the gains of layer {layer} hold the negative value {row.min()}; a curve never falls")
        flat = np.minimum.accumulate(row)
        if (row - flat).max() > 8 * np.finfo(row.dtype).eps * row.sum(dtype=np.float64):
            raise BudgetError(f"the gains of layer {layer} rise; they must not, so give those of a concave curve")
        if checked is gains:
            checked = gains.copy()
        checked[layer] = flat
    return checked
