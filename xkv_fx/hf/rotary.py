"""Rotary embeddings whose angles change with the length: "dynamic" and "longrope".

Keys are kept as they were rotated, and a kept one cannot be rotated again. Up to the length that such an embedding was
made for its angles are fixed, and so far these models are taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from xkv_fx.errors import UnsupportedModelError


@dataclasses.dataclass(frozen=True)
class ChangingRotary:
    """One kind of angles of a rotary embedding that change with the length.

    Attributes:
        path: of the module in its model.
        module: transformers' rotary embedding.
        kind: of layers that it is for; None for all.
        rope_type: as transformers calls it.
    """

    path: str
    module: nn.Module
    kind: str | None
    rope_type: str

    @property
    def longest(self) -> int | None:
        """Up to how many positions the angles are fixed; None if the module does not say so as transformers' do."""
        if not isinstance(getattr(self.module, self._named("original_inv_freq"), None), Tensor):
            return None
        if self.rope_type == "longrope":
            parameters = getattr(getattr(self.module, "config", None), "rope_parameters", None) or {}
            chosen = parameters if self.kind is None else parameters.get(self.kind)
            found = chosen.get("original_max_position_embeddings") if isinstance(chosen, Mapping) else None
        else:
            found = getattr(self.module, "original_max_seq_len", None)
        return found if isinstance(found, int) and found > 0 else None

    def settle(self) -> None:
        """Fix the angles at those of the first positions, in a copy of the model."""
        setattr(self.module, self._named("inv_freq"), getattr(self.module, self._named("original_inv_freq")).clone())
        types: Any = self.module.rope_type
        settled: Any = "default" if self.kind is None else {**types, self.kind: "default"}
        self.module.rope_type = settled

    @property
    def buffers(self) -> list[Tensor]:
        """What the module may change when it is run."""
        found = (getattr(self.module, self._named(name), None) for name in ("inv_freq", "original_inv_freq"))
        return [buffer for buffer in found if isinstance(buffer, Tensor)]

    def refusal(self, model: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{model} cannot be captured: {self.path} is a rotary embedding of type {self.rope_type!r}, whose angles "
            "change with the length; keys that are kept would need other angles later. Types such as 'yarn', 'linear' "
            "and 'llama3' are supported"
        )

    def _named(self, name: str) -> str:
        return name if self.kind is None else f"{self.kind}_{name}"


def changing_rotary(model: nn.Module) -> list[ChangingRotary]:
    """Every kind of angles in a model that changes with the length."""
    found = []
    for path, module in model.named_modules():
        types = getattr(module, "rope_type", None)
        by_kind = types if isinstance(types, dict) else {None: types}
        found += [
            ChangingRotary(path, module, kind, rope_type)
            for kind, rope_type in by_kind.items()
            if isinstance(rope_type, str) and ("dynamic" in rope_type or rope_type == "longrope")
        ]
    return found


def check_rotary(model: nn.Module) -> None:
    """Raise UnsupportedModelError where angles change and nothing says up to which length they do not."""
    for rotary in changing_rotary(model):
        if rotary.longest is None:
            raise rotary.refusal(type(model).__name__)


def refuse_changing_rotary(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model that is not captured, but run as it is."""
    for rotary in changing_rotary(model):
        raise rotary.refusal(type(model).__name__)


def fixed_up_to(model: nn.Module) -> int | None:
    """Up to how many positions no angle changes; None where none ever does."""
    return min((rotary.longest or 1 for rotary in changing_rotary(model)), default=None)
