"""The latents of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), which are keys and values at once."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from xkv_fx.formats import LayerFormats
from xkv_fx.layers import LayerSpec
from xkv_fx.runtime.state.kv import KVState


@dataclasses.dataclass(frozen=True)
class LatentState(KVState):
    """As `KVState` for one KV head. The values are the beginning of the keys and stored with them: `v` has no width."""

    kind: ClassVar[str] = "latents"

    @classmethod
    def serves(cls, spec: LayerSpec, formats: LayerFormats | None) -> bool:
        return formats is None and spec.value_dim == 0

    @property
    def contents(self) -> str:
        return f"latent of {self.spec.key_dim}"
