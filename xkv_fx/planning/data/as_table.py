"""Numbers of each layer, as a short table to print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ENDS = 8
"""Of many layers, so many of the first and of the last are shown."""


def as_table(columns: Sequence[str], rows: NDArray[np.floating[Any]]) -> str:
    """Lines of text with a row for each layer.

    Args:
        columns: what the numbers are of.
        rows: `[layers, columns]`.
    """
    lines = ["layer" + "".join(f"{column:>9}" for column in columns)]
    lines += [f"{layer:5}" + "".join(f"{value:9.4f}" for value in row) for layer, row in enumerate(rows)]
    if len(rows) > 2 * _ENDS:
        lines[1 + _ENDS : -_ENDS] = ["  ..."]
    return "\n".join(lines)
