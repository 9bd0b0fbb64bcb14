"""Indexers of a transformers model: modules that pick, for each query of an attention, the keys that it reaches."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from xkv_fx.errors import UnsupportedModelError

_NUMBER = "index_topk"
"""What models call the number of keys that an indexer picks; it picks all where there are fewer."""

MORE_THAN_ANY = 2**40
"""Larger than any number of tokens, so that a graph that is made with it does not branch on their number."""


def picked_by_indexers(model: PreTrainedModel) -> int | None:
    """How many keys the indexers of a model pick for each query; None without any.

    Raises:
        UnsupportedModelError: an indexer that does not say how many, or several that say different numbers.
    """
    name = type(model).__name__
    numbers: set[int] = set()
    for path, module in _indexers(model):
        number = getattr(module, _NUMBER, None)
        if not isinstance(number, int) or number < 1:
            raise UnsupportedModelError(
                f"{name} cannot be captured: {path} ({type(module).__name__}) picks the keys of each query by what the "
                "tokens are, from keys of its own that it keeps for all of them, and does not pick them one by one"
            )
        numbers.add(number)
    if len(numbers) > 1:
        raise UnsupportedModelError(
            f"{name} cannot be captured: its indexers pick different numbers of keys, {sorted(numbers)}, which is not "
            "supported"
        )
    return next(iter(numbers), None)


def pick(twin: PreTrainedModel, number: int) -> None:
    """Let the indexers of a copy of a model pick so many keys."""
    for _, module in _indexers(twin):
        setattr(module, _NUMBER, number)


def _indexers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    return [(path, part) for path, part in model.named_modules() if "indexer" in type(part).__name__.lower()]
