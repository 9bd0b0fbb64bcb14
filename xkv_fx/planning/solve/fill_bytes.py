"""The solver for a byte budget over layers whose slots differ in size: gain per byte instead of gain per token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int
from xkv_fx.planning.data.curves import checked_curves, shape_of
from xkv_fx.planning.solve.fill import Blocks, blocks_of_curves, fill
from xkv_fx.planning.solve.limits import make_limits


def capacities_for_bytes(
    curves: NDArray[np.floating[Any]],
    slot_bytes: ArrayLike,
    kv_bytes: int,
    *,
    floor: int = 1,
    caps: ArrayLike | None = None,
    multiple: int = 1,
) -> NDArray[np.int64]:
    """A plan of at most `kv_bytes` bytes, filled by gain per byte: int64 `[layers]`.

    Blocks of `multiple` tokens are taken, best gain per byte first; of the first that is too dear for the bytes left,
    the part that they pay for. So it goes on with cheaper layers, until no layer below its cap can take another slot.
    The sum of gains is less than one block's gain below that of the best plan of whole blocks.

    Plans of different budgets are not nested, since what a dear block leaves goes to cheaper layers: where slots differ
    in size, a few more bytes may lower the retention, by less than one block's gain, or by more at a budget from which
    on each layer's floor is affordable in larger blocks.

    Args:
        curves: retention `[layers, context + 1]`; where a curve is not concave its majorant decides.
        slot_bytes: bytes of one slot of each layer over all rows, whole numbers `[layers]`.
        kv_bytes: the most bytes that all layers take together.
        floor, caps, multiple: as in `xkv_fx.planning.solve.fill.fill_by_gain`.

    Raises:
        BudgetError: too few bytes for the floors, or bounds or curves that cannot be used.
    """
    curves = checked_curves(curves)
    price = np.asarray(slot_bytes)
    if price.dtype.kind not in "iu" or price.shape != (len(curves),) or price.min() < 1:
        raise BudgetError(f"slot_bytes must be {len(curves)} whole numbers of at least 1, one a layer; got {price}")
    price = price.astype(np.int64)
    limits = make_limits(*shape_of(curves), floor, caps, multiple)
    check_kv_bytes(kv_bytes, int(limits.floors @ price), floor)
    limits = limits.affordable(kv_bytes, price)
    blocks = blocks_of_curves(curves, limits)
    per_byte = blocks.gains / price[:, None]
    held = blocks.lows
    while True:
        left = kv_bytes - int(held @ price)
        open_to = np.where(price <= left, limits.caps, held)
        if (open_to == held).all():
            return held
        # Each round takes all that is open or ends at something too dear, so prices bound the number of rounds.
        held = fill(Blocks(per_byte, blocks.size, held, open_to), kv_bytes, price)


def check_kv_bytes(kv_bytes: int, fewest: int, floor: int, with_room: bool = False) -> None:
    """Refuse a byte budget that is no whole number, or below the `fewest` bytes that the floors take, with the room
    for appended tokens where there is some.

    Raises:
        BudgetError: as said.
    """
    if not is_int(kv_bytes):
        raise BudgetError(f"kv_bytes must be a whole number of bytes; got {kv_bytes!r}")
    if kv_bytes < fewest:
        slots = "one slot" if floor == 1 else f"the floor of {floor} slots"
        beside = " with the room for max_new_tokens" if with_room else ""
        raise BudgetError(f"kv_bytes of {kv_bytes} is below {slots} a layer, which takes {fewest} bytes{beside}")
