"""Measurements by KV head: each head stands where a layer stands in measurements by layer, until a plan is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int
from xkv_fx.heads import spec_of_heads
from xkv_fx.layers import LayerSpec
from xkv_fx.mean_keys import MeanKey, MeanKeys

T = TypeVar("T")


def check_by(by: Any) -> None:
    """Refuse what is neither `"layer"` nor `"head"`.

    Raises:
        BudgetError: as said.
    """
    if by not in ("layer", "head"):
        raise BudgetError(f"by must be 'layer' or 'head'; got {by!r:.100}")


def one_head_specs(layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """What each KV head of each layer caches."""
    return tuple(spec_of_heads(spec, 1) for spec in layers for _ in range(spec.kv_heads))


def whole_layers(heads: Sequence[LayerSpec], counts: Sequence[int]) -> tuple[LayerSpec, ...]:
    """The layers whose KV heads these are; the opposite of `one_head_specs`.

    Args:
        counts: how many heads each layer has.
    """
    return tuple(spec_of_heads(group[0], len(group)) for group in split(heads, counts))


def split(values: Sequence[T], counts: Sequence[int]) -> list[tuple[T, ...]]:
    """Values of all KV heads, those of each layer by themselves."""
    ends = np.cumsum(counts).tolist()
    return [tuple(values[end - count : end]) for end, count in zip(ends, counts, strict=True)]


def planned_by_layer(values: Sequence[Any], counts: Sequence[int] | None) -> tuple[Any, ...]:
    """Capacities or formats of all KV heads as a plan has them: a tuple for each layer, the value itself where the
    layer has one head. As they are where `counts` is None, since they are those of layers."""
    if counts is None:
        return tuple(values)
    return tuple(group if len(group) > 1 else group[0] for group in split(values, counts))


def tokens_of_heads(total: int, counts: Sequence[int]) -> int:
    """The slots of all KV heads in a total of tokens, in which a layer counts the mean over its heads.

    Raises:
        BudgetError: layers differ in the number of their heads.
    """
    if len(set(counts)) > 1:
        raise BudgetError(
            "total_tokens cannot be asked of layers with different numbers of KV heads, when heads have capacities of "
            "their own; give kv_bytes or a fraction"
        )
    return total * counts[0]


def one_head_means(means: MeanKeys, layers: Sequence[LayerSpec]) -> MeanKeys:
    """The mean keys of KV heads, given those of their layers."""
    return tuple(
        None if mean is None else mean.of_heads((head,))
        for mean, spec in zip(means, layers, strict=True)
        for head in range(spec.kv_heads)
    )


def joined_means(means: MeanKeys | None, counts: Sequence[int]) -> MeanKeys | None:
    """The mean keys of layers, given those of their KV heads; None for a layer in which nothing is subtracted."""
    if means is None:
        return None
    joined: list[MeanKey | None] = []
    for group in split(means, counts):
        there = [mean.values for mean in group if mean is not None]
        joined.append(MeanKey(np.concatenate(there)) if len(there) == len(group) else None)
    return tuple(joined)


def checked_counts(counts: Any, heads: Sequence[LayerSpec]) -> tuple[int, ...] | None:
    """How many KV heads each layer has, None where what was measured are layers.

    Args:
        heads: what was measured.

    Raises:
        BudgetError: not whole numbers of at least 1 that add up to the heads, or heads of one layer that differ.
    """
    if counts is None:
        return None
    if isinstance(counts, str) or not isinstance(counts, Sequence) or not all(is_int(n) and n >= 1 for n in counts):
        raise BudgetError(f"heads must be whole numbers of at least 1, one for each layer; got {counts!r:.200}")
    if sum(counts) != len(heads) or any(spec.kv_heads != 1 for spec in heads):
        raise BudgetError(
            f"heads says {sum(counts)} KV heads, but there are {len(heads)} specs with {sum(s.kv_heads for s in heads)}"
        )
    checked = tuple(int(count) for count in counts)
    for layer, group in enumerate(split(heads, checked)):
        if len(set(group)) > 1:
            raise BudgetError(f"the KV heads of layer {layer} differ in what they cache")
    return checked
