"""All states of a program: everything that decides the shapes of a session's tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from xkv_fx.budgets import Plan
from xkv_fx.errors import BudgetError
from xkv_fx.formats import LayerFormats
from xkv_fx.heads import HeadGroup
from xkv_fx.layers import LayerSpec
from xkv_fx.mean_keys import MeanKey, MeanKeys
from xkv_fx.runtime.reading import Reading
from xkv_fx.runtime.recurrence import StatePart
from xkv_fx.runtime.scorers import reading_of, scorer_of
from xkv_fx.runtime.slots import SlotPlan, slot_plans
from xkv_fx.runtime.state.base import Buffer, Constant, LayerState
from xkv_fx.runtime.state.coded import CodedState
from xkv_fx.runtime.state.counters import CountersState
from xkv_fx.runtime.state.indexed import IndexedState
from xkv_fx.runtime.state.kv import KVState
from xkv_fx.runtime.state.latent import CodedLatentState, LatentState
from xkv_fx.runtime.state.recurrent import RecurrentState
from xkv_fx.runtime.state.tensors import State

CACHE_KINDS: tuple[type[KVState], ...] = (IndexedState, LatentState, CodedLatentState, CodedState, KVState)
"""The kinds of states that a layer's cache may be; the first that serves a layer is taken."""


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """What each session allocates; the graphs are compiled for it.

    Attributes:
        layers: what each layer caches.
        slots: how each cache uses its slots.
        rows: batch rows.
        dtype: of keys and values.
        device: where the tensors live.
        formats: of the keys and values of each cache; None where they are in the model's dtype.
        reading: how prompts are read again; None for a scorer that reads them once.
        recurrent: what each layer keeps that mixes tokens by a state, in execution order.
        mean_keys: what is subtracted from the keys of each cache before they are stored in fewer bits, of the KV heads
            that this process has; None where nothing is.
        groups: the KV heads of each cache, in the order of layers; None where each layer is one cache.
    """

    layers: tuple[LayerSpec, ...]
    slots: tuple[SlotPlan, ...]
    rows: int
    dtype: torch.dtype
    device: torch.device
    formats: tuple[LayerFormats | None, ...] | None = None
    reading: Reading | None = None
    recurrent: tuple[tuple[StatePart, ...], ...] = ()
    mean_keys: MeanKeys | None = None
    groups: tuple[HeadGroup, ...] | None = None

    @classmethod
    def of(
        cls,
        budgets: Plan,
        layers: tuple[LayerSpec, ...],
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        max_new_tokens: int = 0,
        recurrent: tuple[tuple[StatePart, ...], ...] = (),
        part: int = 0,
        parts: int = 1,
    ) -> CachePlan:
        """What `budgets` says, for these layers; layers whose KV heads are planned alike are one cache each.

        Args:
            part, parts: as in `Plan.subtracted`.

        Raises:
            BudgetError: the budgets do not fit the layers, `max_new_tokens` is not a whole number of at least 0, or the
                scorer is unknown.
        """
        slots, groups = slot_plans(budgets, layers, max_new_tokens), budgets.groups(layers)
        formats = tuple(group.formats for group in groups)
        split = groups if len(groups) > len(layers) else None
        means = budgets.subtracted(layers, part, parts)
        if means is not None and split is not None:
            means = tuple(group.mean_of(means[group.layer]) for group in split)
        reading = reading_of(scorer_of(budgets.policy))
        stored = formats if any(formats) else None
        return cls(layers, slots, rows, dtype, device, stored, reading, recurrent, means, split)

    @functools.cached_property
    def specs(self) -> tuple[LayerSpec, ...]:
        """What each cache keeps: that of a layer, or its part."""
        if self.groups is None:
            return self.layers
        return tuple(group.spec_in(self.layers[group.layer]) for group in self.groups)

    def caches_of(self, layer: int) -> tuple[KVState, ...]:
        """The caches of one layer, by their first heads; one where its heads are planned alike.

        Raises:
            IndexError: there is no such layer.
        """
        if self.groups is None:
            return (self.caches[layer],)
        place = range(len(self.layers))[layer]
        return tuple(cache for cache, group in zip(self.caches, self.groups, strict=True) if group.layer == place)

    @functools.cached_property
    def caches(self) -> tuple[KVState, ...]:
        """The state of each cache, in the execution order of layers, those of one layer by their first heads."""
        none = (None,) * len(self.specs)
        each = enumerate(zip(self.specs, self.slots, self.formats or none, self.mean_keys or none, strict=True))
        return tuple(self._cache(index, *of_cache) for index, of_cache in each)

    def _cache(
        self, index: int, spec: LayerSpec, slots: SlotPlan, formats: LayerFormats | None, mean_key: MeanKey | None
    ) -> KVState:
        kind = next(kind for kind in CACHE_KINDS if kind.serves(spec, formats))
        options: dict[str, Any] = {} if formats is None else {"formats": formats, "mean_key": mean_key}
        options["keeps_scores"] = self.reading is not None
        group = None if self.groups is None else self.groups[index]
        return kind(index, spec, slots, self.rows, self.dtype, group, **options)

    @functools.cached_property
    def recurrences(self) -> tuple[RecurrentState, ...]:
        """The state of each layer that mixes tokens by one, in execution order."""
        return tuple(RecurrentState(index, parts, self.rows) for index, parts in enumerate(self.recurrent))

    @functools.cached_property
    def counters(self) -> CountersState:
        """How many tokens each row has seen."""
        return CountersState(self.rows)

    @functools.cached_property
    def states(self) -> tuple[LayerState, ...]:
        """All states, in the order in which graphs take their buffers."""
        return (*self.caches, *self.recurrences, self.counters)

    @functools.cached_property
    def constants(self) -> Mapping[LayerState, tuple[Constant, ...]]:
        """What is compiled into the graphs of each state. Graphs share the tensors."""
        return {state: state.constants(self.device) for state in self.states}

    @functools.cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        """The buffers of all states, in the order in which every graph takes them."""
        return tuple(buffer for state in self.states for buffer in state.buffers)

    def names(self) -> tuple[str, ...]:
        """The names of the buffers, in that order."""
        return tuple(buffer.name for buffer in self.buffers)

    def allocate(self) -> State:
        """Fresh buffers: no token seen.

        Raises:
            BudgetError: there is not enough memory.
        """
        try:
            tensors = tuple(buffer.allocate(self.device) for buffer in self.buffers)
        except (RuntimeError, MemoryError, TypeError, OverflowError) as error:
            raise BudgetError(
                f"this plan needs {self.kv_bytes:,} bytes of KV cache for {self.rows} rows, more than {self.device} "
                "could give; use smaller budgets or a smaller batch"
            ) from error
        return State(self.states, tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the buffers of keys and values."""
        return sum(buffer.nbytes for buffer in self.buffers if buffer.holds == "kv")

    @property
    def other_state_bytes(self) -> int:
        """Bytes of the states of layers that keep no keys and values; no budget changes them."""
        return sum(buffer.nbytes for buffer in self.buffers if buffer.holds == "recurrent")

    @property
    def state_bytes(self) -> int:
        """Bytes of all other buffers: positions, scores and counters."""
        return sum(buffer.nbytes for buffer in self.buffers if buffer.holds == "other")
