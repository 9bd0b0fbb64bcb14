"""KV heads that are planned alike: which heads of a layer share a cache.

Like the plan, this needs neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xkv_fx.formats import LayerFormats, PlannedFormats, codes_keys, formats_of_heads
from xkv_fx.layers import HasItemSize, LayerSpec
from xkv_fx.mean_keys import MeanKey


@dataclasses.dataclass(frozen=True)
class HeadGroup:
    """KV heads of one layer that have equal capacities and formats, and therefore one cache.

    Attributes:
        layer: place among the layers that own a cache.
        heads: the KV heads, ascending.
        capacity: slots of each of them, clamped to the layer's sliding window.
        formats: of keys and values; None for the model's dtype.
    """

    layer: int
    heads: tuple[int, ...]
    capacity: int
    formats: LayerFormats | None

    def spec_in(self, layer: LayerSpec) -> LayerSpec:
        """What a cache of these heads keeps, given what one of all heads of the layer does."""
        return spec_of_heads(layer, len(self.heads))

    def mean_of(self, mean: MeanKey | None) -> MeanKey | None:
        """What is subtracted from the keys of these heads, given the mean key of the layer's; None where they are
        stored as they are."""
        return None if mean is None or not codes_keys(self.formats) else mean.of_heads(self.heads)


def spec_of_heads(layer: LayerSpec, kv_heads: int) -> LayerSpec:
    """What a cache of so many KV heads keeps, given what one of another number of the layer's heads does."""
    queries = layer.query_heads // layer.kv_heads
    return dataclasses.replace(layer, query_heads=queries * kv_heads, kv_heads=kv_heads)


def group_heads(
    layer: int, spec: LayerSpec, capacities: Sequence[int], formats: Sequence[LayerFormats | None]
) -> tuple[HeadGroup, ...]:
    """The groups of one layer, by their first heads.

    Args:
        capacities, formats: of each KV head.
    """
    members: dict[tuple[int, LayerFormats | None], list[int]] = {}
    for head, (capacity, pair) in enumerate(zip(capacities, formats, strict=True)):
        members.setdefault((spec.effective_capacity(capacity), pair), []).append(head)
    return tuple(HeadGroup(layer, tuple(heads), *planned) for planned, heads in members.items())


def planned_slot_bytes(spec: LayerSpec, formats: PlannedFormats, dtype: HasItemSize | None = None) -> int:
    """Bytes that one slot of every KV head of a layer takes, as `LayerSpec.slot_bytes`, whatever formats each has."""
    one_head = spec_of_heads(spec, 1)
    return sum(one_head.slot_bytes(dtype, pair) for pair in formats_of_heads(formats, spec.kv_heads))


def runs_of(heads: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending heads as ranges of neighbours, each from its first head up to, but not including, its end."""
    runs: list[tuple[int, int]] = []
    for head in heads:
        if runs and runs[-1][1] == head:
            runs[-1] = (runs[-1][0], head + 1)
        else:
            runs.append((head, head + 1))
    return runs


def heads_in_words(heads: Sequence[int]) -> str:
    """For people, such as `KV heads 0-2, 5`."""
    named = [f"{first}" if end - first == 1 else f"{first}-{end - 1}" for first, end in runs_of(heads)]
    return f"KV head{'s' if len(heads) > 1 else ''} {', '.join(named)}"
