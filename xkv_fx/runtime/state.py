"""The tensors that a session owns and the graphs mutate: K/V buffers, positions, scores and counters."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xkv_fx.errors import BudgetError
from xkv_fx.layers import LayerSpec
from xkv_fx.runtime.slots import SlotPlan

COUNTERS = ("seen", "base")


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """Everything that decides the shapes of a session's tensors; the graphs are compiled for it.

    Attributes:
        layers: what each layer caches.
        slots: how each layer uses its slots.
        rows: batch rows.
        dtype: of the K/V buffers.
        device: where they live.
    """

    layers: tuple[LayerSpec, ...]
    slots: tuple[SlotPlan, ...]
    rows: int
    dtype: torch.dtype
    device: torch.device

    def names(self) -> tuple[str, ...]:
        """Names of the state tensors, in the order in which every graph takes them."""
        per_layer = (
            f"{kind}_{layer}"
            for layer, plan in enumerate(self.slots)
            for kind in ("k", "v", "positions", *(("scores",) if plan.eviction == "scored" else ()))
        )
        return (*per_layer, *COUNTERS)

    def allocate(self) -> State:
        """Fresh buffers: no token seen, K/V zeroed (a masked slot must still hold finite numbers)."""
        try:
            return State(self, tuple(self._empty(name) for name in self.names()))
        except (RuntimeError, MemoryError, TypeError, OverflowError) as error:
            raise BudgetError(
                f"this plan needs {self.kv_bytes:,} bytes of KV cache for {self.rows} rows, more than {self.device} "
                "could give; use smaller budgets or a smaller batch"
            ) from error

    @property
    def kv_bytes(self) -> int:
        """Bytes of the K/V buffers."""
        return self.rows * sum(
            plan.slots * spec.slot_bytes(self.dtype) for spec, plan in zip(self.layers, self.slots, strict=True)
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of positions, scores and counters."""
        shapes = (self.shape_and_dtype(name) for name in self.names())
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes) - self.kv_bytes

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the state tensor of that name."""
        if name in COUNTERS:
            return (self.rows,), torch.int64
        kind, _, layer = name.partition("_")
        spec, slots = self.layers[int(layer)], self.slots[int(layer)].slots
        shape = (self.rows, spec.kv_heads, slots)
        if kind == "positions":
            return shape, torch.int32
        if kind == "scores":
            return shape, torch.float32
        return (*shape, spec.key_dim if kind == "k" else spec.value_dim), self.dtype

    def _empty(self, name: str) -> Tensor:
        shape, dtype = self.shape_and_dtype(name)
        if name.startswith("positions"):
            return torch.arange(shape[2], dtype=dtype, device=self.device).expand(shape).contiguous()
        return torch.zeros(shape, dtype=dtype, device=self.device)


@dataclasses.dataclass(frozen=True)
class State:
    """The tensors of one session, in the order of `CachePlan.names`."""

    plan: CachePlan
    tensors: tuple[Tensor, ...]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self._numbers[name]]

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.plan.names())}

    @property
    def kv_bytes(self) -> int:
        """Bytes of the K/V buffers, counted from the tensors themselves."""
        return sum(self._bytes(kind) for kind in ("k", "v"))

    @property
    def state_bytes(self) -> int:
        """Bytes of everything else: positions, scores and counters."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors) - self.kv_bytes

    def _bytes(self, kind: str) -> int:
        pairs = zip(self.plan.names(), self.tensors, strict=True)
        return sum(tensor.untyped_storage().nbytes() for name, tensor in pairs if name.startswith(f"{kind}_"))

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget every token, or those of some rows. Buffers stay where they are, so that graphs stay valid."""
        chosen = slice(None) if rows is None else list(rows)
        for name, tensor in zip(self.plan.names(), self.tensors, strict=True):
            if name.startswith("positions_"):
                tensor[chosen] = torch.arange(tensor.shape[2], dtype=tensor.dtype, device=tensor.device)
            elif name in COUNTERS or name.startswith("scores_"):
                tensor[chosen] = 0

    def clone(self) -> State:
        """An independent copy."""
        return State(self.plan, tuple(tensor.clone() for tensor in self.tensors))

    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row `rows[i]`, as beam search does."""
        for tensor in self.tensors:
            tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))

    def ordinals(self, layer: int) -> Tensor:
        """Which tokens a layer keeps now: int64 `[rows, kv_heads, slots]`, -1 for a free slot."""
        return self.plan.slots[layer].ordinals(self[f"positions_{layer}"], self["seen"], self["base"])
