"""The solver for a byte budget in which each layer chooses its capacity and its formats together.

That is a multiple-choice knapsack: each layer takes one of its options, each of which has a price in bytes and a
measured KL. Steps along the lower convex hulls of the layers' options, steepest first, are the best choice for every
sum of bytes that they meet (Sinha and Zoltners, The multiple-choice knapsack problem, 1979); what is left in between is
spent on what still fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from xkv_fx.planning.solve.fill_bytes import check_kv_bytes
from xkv_fx.planning.solve.limits import Limits, make_limits

Whole = NDArray[np.int64]
Real = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Options:
    """What one layer can be given, by rising bytes and falling KL; what is no better for more bytes is left out.

    Attributes:
        bytes: int64 `[options]`, rising.
        kl: float64 `[options]`, falling.
        capacities: int64 `[options]`.
        pairs: int64 `[options]`, which pair of formats it is.
    """

    bytes: Whole
    kl: Real
    capacities: Whole
    pairs: Whole

    def on_hull(self) -> tuple[Whole, Real]:
        """The options on the lower convex hull, and for each but the first, the KL that a byte of the step to it gains:
        int64 `[steps + 1]`, and float64 `[steps]`, nowhere rising."""
        if len(self.bytes) == 1:
            return np.zeros(1, np.int64), np.zeros(0)
        widths = np.diff(self.bytes)
        gains = isotonic_regression(-np.diff(self.kl) / widths, weights=widths, increasing=False).x
        hull = self.kl[0] - np.concatenate(([0.0], np.cumsum(gains * widths)))
        places = np.flatnonzero(self.kl <= hull + 1e-12 * self.kl[0])
        return places, gains[places[1:] - 1]

    def best_within(self, kv_bytes: int) -> int:
        """The option of the smallest KL that takes at most so many bytes, which are enough for the first one."""
        return int(self.bytes.searchsorted(kv_bytes, side="right")) - 1


def capacities_and_pairs(
    curves: Real,
    slot_bytes: Whole,
    least: Whole,
    kv_bytes: int,
    *,
    caps: Sequence[int],
    room: Whole | None = None,
    floor: int = 1,
    multiple: int = 1,
) -> tuple[Whole, Whole]:
    """Each layer's capacity and pair of formats, of at most `kv_bytes` bytes: int64 `[layers]` both.

    Options are whole blocks of `multiple` tokens, and the cap, in each pair from the least capacity on that was
    measured; less than that only in the pair of the fewest bytes, and only where the bytes do not suffice otherwise.
    The sum of KL is above that of the best choice of options by less than what the first step that does not fit would
    gain. Then single slots are added, until no layer below its cap can take another one.

    Args:
        curves: KL, nowhere rising, `[pairs, layers, context + 1]`.
        slot_bytes: of one slot over all rows, `[pairs, layers]`, at least 1.
        least: the least capacity that was measured, `[pairs, layers]`.
        kv_bytes: the most bytes that all layers take together, room included.
        room: slots that each layer is given besides its capacity, `[layers]`; none by default.
        caps, floor, multiple: as in `xkv_fx.planning.solve.fill.fill_by_gain`.

    Raises:
        BudgetError: too few bytes for the floors, or bounds that cannot be used.
    """
    layers = range(curves.shape[1])
    fewest = slot_bytes.min(0)
    limits = make_limits(len(layers), curves.shape[2] - 1, floor, caps, multiple)
    room = np.zeros_like(limits.caps) if room is None else room
    check_kv_bytes(kv_bytes, int((limits.floors + room) @ fewest), floor, bool(room.any()))
    limits = limits.affordable(kv_bytes - int(room @ fewest), fewest)
    starts = _starts(slot_bytes, least, limits, room, kv_bytes)
    options = [
        _options(curves[:, at], slot_bytes[:, at], starts[:, at], limits, int(limits.caps[at]), int(room[at]))
        for at in layers
    ]
    taken = _along_hulls(options, kv_bytes)
    _spend(options, taken, kv_bytes)
    capacities = np.array([of.capacities[at] for of, at in zip(options, taken, strict=True)])
    pairs = np.array([of.pairs[at] for of, at in zip(options, taken, strict=True)])
    prices = slot_bytes[pairs, layers]
    add_single_slots(capacities, curves[pairs, layers], prices, limits.caps, kv_bytes - int(room @ prices))
    return capacities, pairs


def _starts(slot_bytes: Whole, least: Whole, limits: Limits, room: Whole, kv_bytes: int) -> Whole:
    """The smallest capacity that is an option in each pair and layer, `[pairs, layers]`."""
    starts = np.maximum(_in_blocks(least, limits), limits.lows)
    cheapest = slot_bytes.argmin(0)[None]
    if int(((np.take_along_axis(starts, cheapest, 0)[0] + room) * slot_bytes.min(0)).sum()) > kv_bytes:
        np.put_along_axis(starts, cheapest, limits.lows[None], 0)
    return starts


def _in_blocks(capacities: Whole, limits: Limits) -> Whole:
    """Rounded up to whole blocks, or the caps."""
    blocks: Whole = np.minimum(-(-capacities // limits.multiple) * limits.multiple, limits.caps)
    return blocks


def _options(curves: Real, slot_bytes: Whole, starts: Whole, limits: Limits, cap: int, room: int) -> Options:
    """The options of a layer, from its curves `[pairs, context + 1]`; their bytes include its room."""
    choices = [np.append(np.arange(start, cap, limits.multiple), cap) for start in starts.tolist()]
    pairs = np.repeat(np.arange(len(choices)), [len(choice) for choice in choices])
    capacities = np.concatenate(choices)
    kl, size = curves[pairs, capacities], slot_bytes[pairs] * (capacities + room)
    order = np.lexsort((kl, size))
    kl = kl[order]
    better = np.concatenate(([True], kl[1:] < np.minimum.accumulate(kl)[:-1]))
    order = order[better]
    return Options(size[order], kl[better], capacities[order], pairs[order])


def _along_hulls(options: Sequence[Options], kv_bytes: int) -> Whole:
    """Of each layer the option that all steps which fit lead to, the steepest taken first: int64 `[layers]`."""
    hulls = [of.on_hull() for of in options]
    gains = np.concatenate([gain for _, gain in hulls])
    prices = np.concatenate([np.diff(of.bytes[places]) for of, (places, _) in zip(options, hulls, strict=True)])
    layer = np.repeat(np.arange(len(options)), [len(gain) for _, gain in hulls])
    order = np.argsort(-gains, kind="stable")  # steps of a layer stay in their order
    left = kv_bytes - sum(int(of.bytes[0]) for of in options)
    fitting = int(np.cumsum(prices[order]).searchsorted(left, side="right"))
    steps = np.bincount(layer[order[:fitting]], minlength=len(options))
    return np.array([places[count] for (places, _), count in zip(hulls, steps, strict=True)])


def _spend(options: Sequence[Options], taken: Whole, kv_bytes: int) -> None:
    """Move on to better options while the bytes that are left pay for one, the one that gains most first; in place."""
    while True:
        left = kv_bytes - sum(int(of.bytes[at]) for of, at in zip(options, taken, strict=True))
        better = [of.best_within(int(of.bytes[at]) + left) for of, at in zip(options, taken, strict=True)]
        gains = [of.kl[at] - of.kl[new] for of, at, new in zip(options, taken, better, strict=True)]
        layer = int(np.argmax(gains))
        if gains[layer] <= 0:
            return
        taken[layer] = better[layer]


def add_single_slots(capacities: Whole, curves: Real, slot_bytes: Whole, caps: Whole, kv_bytes: int) -> None:
    """Spend what is left on further slots, until no layer below its cap can take one; in place.

    Args:
        curves: KL of the layers in their formats, `[layers, context + 1]`.
        slot_bytes: of one slot, `[layers]`.
    """
    left = kv_bytes - int(capacities @ slot_bytes)
    layers = np.arange(len(capacities))
    gains = (curves[layers, capacities] - curves[layers, np.minimum(capacities + 1, caps)]) / slot_bytes
    for layer in np.argsort(-gains, kind="stable"):
        more = min(int(caps[layer] - capacities[layer]), left // int(slot_bytes[layer]))
        capacities[layer] += more
        left -= more * int(slot_bytes[layer])
