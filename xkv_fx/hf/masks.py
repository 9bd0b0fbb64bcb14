"""Masks in transformers' attention interface: ours are None, and what they would have been is read off their functions.

A model says what a query sees twice: by the mask that it has made, and by the `sliding_window` that it gives attention.
The graphs go by the second. Here both are compared, so that no mask is dropped which a short prompt does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xkv_fx.errors import UnsupportedModelError

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
FARTHEST = 300_000
_recorded: ContextVar[list[MaskFunction] | None] = ContextVar("xkv_masks", default=None)


def no_mask(*args: Any, mask_function: MaskFunction | None = None, **kwargs: Any) -> None:
    """The graphs mask by counting: padding is moved out of the way and causality is the op's own."""
    recorded = _recorded.get()
    if recorded is not None and mask_function is not None:
        recorded.append(mask_function)


@contextmanager
def recording_masks() -> Iterator[list[MaskFunction]]:
    """Collects the functions of all masks that are made meanwhile."""
    found: list[MaskFunction] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


def check_masks(
    model: PreTrainedModel, masks: Sequence[MaskFunction], windows: Sequence[int | None], longest: int | None
) -> None:
    """Check that the sliding windows given to attention are those of the masks.

    Args:
        masks: what masks say: `(row, head, query, key)` -> whether it is seen.
        windows: the sliding window of each attention.
        longest: the longest sequence that the model has positions for.

    Raises:
        UnsupportedModelError: a mask is neither causal nor a sliding window, or attention is not told of one.
    """
    if not masks:
        return
    name = type(model).__name__
    last = min(longest or FARTHEST, FARTHEST) - 1
    made = {_window(mask, last, name) for mask in masks}
    given = {None if window is None or window > last else window for window in windows}
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    told = any("sliding" in kind for kind in kinds)
    unsaid = made - given if told else set()
    if given - made or unsaid - {None}:
        raise UnsupportedModelError(
            f"{name} makes masks with sliding windows {_listed(made)} but gives its attention {_listed(given)}; it "
            "cannot be captured exactly"
        )


def _window(mask: MaskFunction, last: int, name: str) -> int | None:
    """The sliding window of a mask, None if it is plainly causal up to the query `last`."""
    zero = torch.zeros((), dtype=torch.int64)
    sizes = []
    for query in {last, max(last - 1, 0), last // 2}:
        keys = torch.arange(query + 2)
        try:
            seen = mask(zero, zero, torch.tensor(query), keys).expand(query + 2)
        except Exception as error:
            raise UnsupportedModelError(
                f"{name} makes a mask that depends on more than two tokens' positions; it cannot be captured exactly"
            ) from error
        if bool(seen[-1]):
            raise UnsupportedModelError(
                f"{name} attends to tokens that come later; only causal attention has a KV cache"
            )
        size = int(seen.sum())
        if not bool(seen[query + 1 - size : query + 1].all()):
            raise UnsupportedModelError(f"{name} makes a mask that is neither causal nor a sliding window")
        sizes.append(None if size == query + 1 else size)
    found = {size for size in sizes if size is not None}
    if len(found) > 1 or (found and sizes.count(None) and max(found) <= last // 2):
        raise UnsupportedModelError(f"{name} makes a mask that is neither causal nor a sliding window, but in chunks")
    return next(iter(found), None)


def _listed(windows: set[int | None]) -> str:
    return ", ".join(sorted("none" if window is None else str(window) for window in windows))
