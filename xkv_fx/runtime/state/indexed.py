"""Keys and values of a layer whose queries attend to those that an indexer picks, and the keys that it picks by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from xkv_fx.errors import BudgetError
from xkv_fx.formats import LayerFormats
from xkv_fx.layers import LayerSpec
from xkv_fx.mean_keys import MeanKey
from xkv_fx.runtime.form import Index
from xkv_fx.runtime.state.base import Attention, Buffer, Build, Value
from xkv_fx.runtime.state.kv import CacheOps, KVState

xkv = torch.ops.xkv


@dataclasses.dataclass(frozen=True)
class IndexedState(KVState):
    """As `KVState` or `LatentState`, with `index` `[rows, kv_heads, slots, index_dim]`: the indexer's key of each slot,
    which is kept, evicted and counted with the slot. Each query attends to its `top_k` of the kept ones.

    Tokens survive by their scores as in other layers: scorers see the attention to all tokens.
    """

    kind: ClassVar[str] = "keys and values with an index"
    formats: LayerFormats | None = None
    mean_key: MeanKey | None = None

    ops: ClassVar[CacheOps] = CacheOps("decode_attention", "decode_scored", "extend_indexed", "keep")

    def __post_init__(self) -> None:
        if self.formats is None:
            return
        try:
            self.spec.check_formats()
        except BudgetError as error:
            raise BudgetError(f"{self.where}: {error}") from error

    @classmethod
    def serves(cls, spec: LayerSpec, formats: LayerFormats | None) -> bool:
        return spec.index_dim > 0

    @property
    def _beside(self) -> list[Buffer]:
        shape = (*self._shape, self.spec.index_dim)
        return [self._buffer("index", shape, self.dtype, holds="kv", reset="stale")]

    @property
    def contents(self) -> str:
        kept = super().contents if self.spec.value_dim else f"latent of {self.spec.key_dim}"
        return f"{kept} + index of {self.spec.index_dim}"

    def _reach(self, build: Build, attention: Attention, given: Sequence[Value]) -> dict[str, Any]:
        index = _index_of(attention)
        return {
            "index_queries": index.queries, "index_keys": index.keys, "index_weights": index.weights,
            "index_cache": build.held(self)["index"], "top_k": index.top_k,
        }  # fmt: skip

    def _picked(self, build: Build, attention: Attention, slot: Value, mask: Value) -> Value:
        index = _index_of(attention)
        return build.emit(
            xkv.pick_slots.default, index.queries, index.keys, index.weights, build.held(self)["index"], slot, mask,
            index.top_k, name=f"picked_{attention.index}",
        )  # fmt: skip

    def _keep_beside(self, build: Build, attention: Attention, source: Value, fresh: bool) -> None:
        build.emit(
            xkv.keep_index.default, _index_of(attention).keys, source, build.held(self)["index"],
            capacity=self.slots.capacity, fresh=fresh,
        )  # fmt: skip


def _index_of(attention: Attention) -> Index:
    index = attention.form.index
    if index is None:
        raise TypeError(f"attention {attention.index} has no indexer, though its cache keeps one's keys")
    return index
