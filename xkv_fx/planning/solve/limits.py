"""The bounds that every plan keeps: a floor and a cap for each layer, and the block size that capacities come in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int


@dataclasses.dataclass(frozen=True)
class Limits:
    """Which capacities the layers may have.

    Attributes:
        context: tokens of prompt, which no capacity exceeds.
        floor: the fewest slots of a layer, as asked for.
        caps: int64 `[layers]`, the most slots of each layer.
        multiple: capacities are whole blocks of this many slots, or the layer's cap; where a total must be exact, one
            layer holds a part of a block.
        coarser: the next larger block, where a total is too small for it; None otherwise.
    """

    context: int
    floor: int
    caps: NDArray[np.int64]
    multiple: int
    coarser: int | None = None

    @property
    def layers(self) -> int:
        return len(self.caps)

    @property
    def floors(self) -> NDArray[np.int64]:
        """The fewest slots of each layer, `[layers]`: the floor, or the cap of a layer that cannot hold as many."""
        return np.minimum(self.floor, self.caps)

    @property
    def lows(self) -> NDArray[np.int64]:
        """The smallest capacity of each layer that is allowed, `[layers]`: the floor in whole blocks, or the cap."""
        return self._floors_in_blocks(self.multiple)

    @property
    def tops(self) -> NDArray[np.int64]:
        """The largest capacity of each layer, `[layers]`, in a plan that is filled block by block.

        That is the cap; but where the next larger block is too large for a total, the capacities from which plans of
        that block start. So the plans of all totals are nested, and a larger total never keeps less.
        """
        return self.caps if self.coarser is None else self._floors_in_blocks(self.coarser)

    def _floors_in_blocks(self, size: int) -> NDArray[np.int64]:
        return np.minimum(-(-self.floors // size) * size, self.caps)

    def for_total(self, total: int) -> Limits:
        """These limits, with the blocks made smaller where `total` cannot give each layer its floor in whole ones.

        Then the block is the largest power of two that divides `multiple` and is small enough.

        Raises:
            BudgetError: fewer tokens than the floors, or more than the caps.
        """
        if not is_int(total):
            raise BudgetError(f"the total must be a whole number of tokens; got {total!r}")
        fewest, most, everything = int(self.floors.sum()), int(self.caps.sum()), self.layers * self.context
        if total < fewest:
            kind = "below one slot a layer" if self.floor == 1 else f"below the floor of {self.floor} slots a layer"
            raise BudgetError(f"a total of {total} tokens is {kind}; {self.layers} layers need at least {fewest}")
        if total > everything:
            raise BudgetError(
                f"a total of {total} tokens is above layers x context = {self.layers} x {self.context} = {everything}"
            )
        if total > most:
            raise BudgetError(
                f"a total of {total} tokens is within layers x context = {everything}, but above the {most} that the "
                "layers can hold (a sliding window clamps what its layer holds); ask for at most that many"
            )
        return self.affordable(total)

    def affordable(self, budget: int, cost: NDArray[np.int64] | None = None) -> Limits:
        """These limits, with the blocks made smaller as in `for_total`, when a slot of each layer costs `cost`."""
        price = np.ones_like(self.caps) if cost is None else cost
        coarser = None
        for multiple in _block_sizes(self.multiple):
            finer = dataclasses.replace(self, multiple=multiple, coarser=coarser)
            if int(finer.lows @ price) <= budget:
                return finer
            coarser = multiple
        raise BudgetError(f"{budget} is too little for the floor of {self.floor} slots in each of {self.layers} layers")


def make_limits(layers: int, context: int, floor: int, caps: ArrayLike | None, multiple: int) -> Limits:
    """Check the bounds that a caller gave.

    Args:
        layers, context: the shape of the curves.
        floor: the fewest slots of every layer; a layer whose cap is lower gets its cap.
        caps: whole numbers `[layers]`, each from 1 to `context`; None for `context`.
        multiple: tokens in a block.

    Raises:
        BudgetError: a floor, cap or multiple that is no whole number or out of range.
    """
    for name, value in (("floor", floor), ("multiple", multiple)):
        if not is_int(value) or value < 1:
            raise BudgetError(f"{name} must be a whole number of at least 1; got {value!r}")
    if floor > context:
        raise BudgetError(f"a floor of {floor} slots is above the context of {context} tokens")
    most = np.full(layers, context) if caps is None else np.asarray(caps)
    if most.dtype.kind not in "iu" or most.shape != (layers,):
        raise BudgetError(f"caps must be {layers} whole numbers, one a layer; got {most.dtype} {most.shape}")
    if most.min() < 1 or most.max() > context:
        raise BudgetError(f"caps must lie between 1 and the context of {context}; got {most.min()} to {most.max()}")
    return Limits(context, int(floor), most.astype(np.int64), int(multiple))


def _block_sizes(multiple: int) -> Iterator[int]:
    """`multiple`, then the powers of two below it that divide it, down to 1."""
    yield multiple
    size = multiple & -multiple
    while size:
        if size < multiple:
            yield size
        size //= 2
