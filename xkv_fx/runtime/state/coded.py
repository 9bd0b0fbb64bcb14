"""Keys and values of one layer in fewer bits: codes, with a scale and a zero for each group of elements of a slot."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch

from xkv_fx.errors import BudgetError
from xkv_fx.formats import LayerFormats, SlotFormat
from xkv_fx.layers import LayerSpec
from xkv_fx.mean_keys import MeanKey
from xkv_fx.runtime.quantize import Coding, mean_tensor
from xkv_fx.runtime.scorers import rescore_coded_tokens
from xkv_fx.runtime.state.base import Buffer, Constant
from xkv_fx.runtime.state.kv import CacheOps, KVState


@dataclasses.dataclass(frozen=True)
class CodedState(KVState):
    """As `KVState`; `k` and `v` hold codes where their format is coded, with `k_scales` and `v_scales` beside them.

    Tokens pass through their format once, when they are written: by prefill after the survivors are chosen, by decode
    for one slot. The attention of a prompt among its own tokens is that of the model.

    Attributes:
        formats: of keys, and of values.
        mean_key: what is subtracted from keys before they are stored; None for nothing.
    """

    kind: ClassVar[str] = "keys and values in fewer bits"
    formats: LayerFormats = ("model", "model")
    mean_key: MeanKey | None = None

    ops: ClassVar[CacheOps] = CacheOps("decode_coded", "decode_coded_scored", "extend_coded", "keep_coded")
    rescore: ClassVar[Any] = staticmethod(rescore_coded_tokens)

    @classmethod
    def serves(cls, spec: LayerSpec, formats: LayerFormats | None) -> bool:
        return formats is not None and spec.value_dim > 0

    @functools.cached_property
    def codings(self) -> tuple[Coding | None, Coding | None]:
        """Of keys and of values; None for the model's dtype.

        Raises:
            BudgetError: a head size that no group divides; the message names the layer.
        """
        keys, values = self.formats
        return self._coding(keys, self.spec.key_dim), self._coding(values, self.spec.value_dim)

    def _coding(self, name: SlotFormat, size: int) -> Coding | None:
        try:
            return None if name == "model" else Coding.of(name, size)
        except BudgetError as error:
            raise BudgetError(f"{self.where}: {error}") from error

    @property
    def _stored(self) -> list[Buffer]:
        buffers = []
        for field, size, coding in zip("kv", (self.spec.key_dim, self.spec.value_dim), self.codings, strict=True):
            width, dtype = (size, self.dtype) if coding is None else (coding.code_bytes, torch.uint8)
            scales = (*self._shape, *((0, 2) if coding is None else (coding.groups, coding.numbers)))
            buffers.append(self._buffer(field, (*self._shape, width), dtype, holds="kv", reset="stale"))
            buffers.append(self._buffer(f"{field}_scales", scales, torch.float16, holds="kv", reset="stale"))
        return buffers

    def constants(self, device: torch.device) -> tuple[Constant, ...]:
        if self.mean_key is None:
            return ()
        return (Constant(f"key_mean_{self.index}", "key_mean", mean_tensor(self.mean_key, self.dtype, device)),)

    @property
    def _numbers(self) -> dict[str, Any]:
        key, value = self.codings
        return {"key_bits": 0 if key is None else key.bits, "value_bits": 0 if value is None else value.bits}

    @property
    def contents(self) -> str:
        keys, values = self.formats
        return f"{super().contents} {keys}/{values}"
