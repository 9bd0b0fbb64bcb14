"""The latents of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), which are keys and values at once."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

from xkv_fx.errors import BudgetError
from xkv_fx.formats import LayerFormats, check_latent
from xkv_fx.layers import LayerSpec
from xkv_fx.runtime.quantize import Coding
from xkv_fx.runtime.state.coded import CodedState
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


@dataclasses.dataclass(frozen=True)
class CodedLatentState(CodedState):
    """As `CodedState`, of latents: one vector with one format, the latent and its rotary key; `v` has no width."""

    kind: ClassVar[str] = "latents in fewer bits"

    @classmethod
    def serves(cls, spec: LayerSpec, formats: LayerFormats | None) -> bool:
        return formats is not None and spec.value_dim == 0

    @functools.cached_property
    def codings(self) -> tuple[Coding | None, Coding | None]:
        """Of the latents, and nothing for the values that are stored with them.

        Raises:
            BudgetError: two formats, or a size that no group divides; the message names the layer.
        """
        try:
            check_latent(self.formats)
        except BudgetError as error:
            raise BudgetError(f"{self.where}: {error}") from error
        return self._coding(self.formats[0], self.spec.key_dim), None

    @property
    def contents(self) -> str:
        return f"latent of {self.spec.key_dim} {self.formats[0]}"
