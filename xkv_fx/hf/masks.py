"""Masks in transformers' attention interface: ours mark padding and nothing else; what the model's own
masks would have been is read off its mask functions.

A model says what a query sees twice: by the mask that it has made, and by the `sliding_window` that it gives attention.
The graphs go by the second. Here the two are compared, so that no mask is dropped whose effect a short prompt hides.
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
from xkv_fx.runtime import capture_marks  # noqa: F401  (registers the marks)

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
FARTHEST = 300_000
_recorded: ContextVar[list[MaskFunction] | None] = ContextVar("xkv_masks", default=None)


def padding_mask(
    *args: Any,
    q_length: int,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The graphs mask by counting: padding is moved out of the way and causality is the op's own.

    Returns:
        None while a model is captured; elsewhere which of the new tokens are no padding, bool `[rows, q_length]`, None
        if all are.

    Raises:
        UnsupportedModelError: a model that is neither captured nor compiled combines the causal mask with another.
    """
    if not torch.compiler.is_dynamo_compiling():  # what a compiled model's masks are is found out when it gets a cache
        recorded = _recorded.get()
        if recorded is not None:
            recorded.extend(() if mask_function is None else (mask_function,))
            return None
        if torch.compiler.is_exporting():
            return None
        if not allow_is_causal_skip:
            raise UnsupportedModelError(
                "the attention 'xkv' is causal and knows of padding; this model, or sequences packed into one row, "
                "need a mask besides"
            )
    if attention_mask is None:
        return None
    valid = attention_mask[:, -q_length:]
    return valid if torch.compiler.is_dynamo_compiling() or not bool(valid.all()) else None


def picking_mask(
    *args: Any, batch_size: int, q_length: int, device: torch.device, mask_function: MaskFunction, **kwargs: Any
) -> Tensor:
    """The mask that models with indexers pick below, while they are captured: the op that marks it. Whether it is the
    causal one is found out before, from the mask functions.

    Raises:
        UnsupportedModelError: a model is run, and not captured.
    """
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(mask_function)
    elif not torch.compiler.is_exporting():
        raise UnsupportedModelError("attention over picked keys is for capture alone; choose another implementation")
    mask: Tensor = torch.ops.xkv.causal_pairs(batch_size, q_length, device)
    return mask


@contextmanager
def recording_masks() -> Iterator[list[MaskFunction]]:
    """Collects the functions of all masks that are made meanwhile."""
    found: list[MaskFunction] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


class OutOfSightError(Exception):
    """Raised when a mask looks tokens up, and was made for too few tokens to show what it does."""


def check_masks(
    model: PreTrainedModel, masks: Sequence[MaskFunction], windows: Sequence[int | None], last: int
) -> None:
    """Check that the sliding windows given to attention are those of the masks.

    Args:
        masks: what masks say: `(row, head, query, key)` -> whether it is seen.
        windows: the sliding window of each attention.
        last: the last query to look at.

    Raises:
        UnsupportedModelError: a mask is neither causal nor a sliding window, or attention is not told its window.
        OutOfSightError: see there.
    """
    if not masks:
        return
    name = type(model).__name__
    causal = [mask for mask in masks if not _looks_ahead(mask)]  # others are for encoders, which are not in use
    if not causal:
        raise UnsupportedModelError(f"{name} attends to tokens that come later; only causal attention has a KV cache")
    made = {_window(mask, last, name) for mask in causal}
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
    sizes = []
    for query in {last, max(last - 1, 0), last // 2}:
        seen = _seen(mask, query)
        size = int(seen.sum())
        if not bool(seen[query + 1 - size :].all()):
            raise UnsupportedModelError(f"{name} makes a mask that is neither causal nor a sliding window")
        sizes.append(None if size == query + 1 else size)
    found = {size for size in sizes if size is not None}
    if len(found) > 1 or (found and None in sizes and max(found) <= last // 2):
        raise UnsupportedModelError(f"{name} makes a mask that is neither causal nor a sliding window, but in chunks")
    return next(iter(found), None)


def _seen(mask: MaskFunction, query: int) -> Tensor:
    """Which keys a query sees, bool `[query + 1]`, up to its own."""
    zero = torch.zeros((), dtype=torch.int64)
    try:
        return mask(zero, zero, torch.tensor(query), torch.arange(query + 1)).expand(query + 1)
    except IndexError as error:
        raise OutOfSightError from error


def _looks_ahead(mask: MaskFunction) -> bool:
    zero = torch.zeros((), dtype=torch.int64)
    return bool(mask(zero, zero, zero, torch.arange(2)).expand(2)[1])


def _listed(windows: set[int | None]) -> str:
    return ", ".join(sorted("none" if window is None else str(window) for window in windows))
