"""The cache of an earlier attention, for one that attends to that one's keys and values (Gemma 3n)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from xkv_fx.runtime.state.base import Attention, Buffer, Build, LayerState, Value
from xkv_fx.runtime.state.kv import KVState


@dataclasses.dataclass(frozen=True)
class BorrowedState(LayerState):
    """It has no tensors: what it reads, the owner keeps.

    In decode it writes what the owner has written already, so that it can be called in the same way.

    Attributes:
        owner: whose cache it is.
    """

    kind: ClassVar[str] = "borrowed cache"
    owner: KVState

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return ()

    def extend(self, build: Build, attention: Attention) -> Value:
        return self.owner.extend(build, attention)

    def decode(self, build: Build, attention: Attention) -> Value:
        return self.owner.decode(build, attention)
