"""Rotary embeddings whose angles change with the length: "dynamic" and "longrope".

Keys are kept as they were rotated, and a kept one cannot be rotated again. The angles of such an embedding are fixed up
to the length that it was made for, so these models are accepted up to that length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from xkv_fx.errors import UnsupportedModelError


@dataclasses.dataclass(frozen=True)
class ChangingRotary:
    """One kind of angles of a rotary embedding that change with the length.

    Attributes:
        path: of transformers' rotary embedding in its model, or in a copy of it.
        kind: of layers that it is for; None for all.
        rope_type: as transformers calls it.
        longest: up to how many positions the angles are fixed.
    """

    path: str
    kind: str | None
    rope_type: str
    longest: int

    def buffers(self, model: nn.Module) -> list[Tensor]:
        """What the module may change when it is run."""
        module = model.get_submodule(self.path)
        found = (getattr(module, _named(name, self.kind), None) for name in ("inv_freq", "original_inv_freq"))
        return [buffer for buffer in found if isinstance(buffer, Tensor)]

    def settle(self, copy: nn.Module) -> None:
        """Fix the angles at those of the first positions, in a copy of the model."""
        module = copy.get_submodule(self.path)
        first: Any = getattr(module, _named("original_inv_freq", self.kind))
        setattr(module, _named("inv_freq", self.kind), first.clone())
        types: Any = module.rope_type
        settled: Any = "default" if self.kind is None else {**types, self.kind: "default"}
        module.rope_type = settled


def changing_rotary(model: nn.Module) -> tuple[ChangingRotary, ...]:
    """Every kind of angles in a model that changes with the length.

    Raises:
        UnsupportedModelError: nothing says up to which length the angles stay fixed.
    """
    found = []
    for path, module in model.named_modules():
        types = getattr(module, "rope_type", None)
        by_kind = types if isinstance(types, dict) else {None: types}
        for kind, rope_type in by_kind.items():
            if isinstance(rope_type, str) and ("dynamic" in rope_type or rope_type == "longrope"):
                longest = _longest(module, kind, rope_type)
                if longest is None:
                    raise _refusal(type(model).__name__, path, rope_type)
                found.append(ChangingRotary(path, kind, rope_type, longest))
    return tuple(found)


def refuse_changing_rotary(name: str, rotaries: Sequence[ChangingRotary]) -> None:
    """Raise UnsupportedModelError for a model that is not captured, but run as it is."""
    for rotary in rotaries:
        raise _refusal(name, rotary.path, rotary.rope_type)


def fixed_up_to(rotaries: Sequence[ChangingRotary]) -> int | None:
    """Up to how many positions no angle changes; None where none ever does."""
    return min((rotary.longest for rotary in rotaries), default=None)


def _longest(module: nn.Module, kind: str | None, rope_type: str) -> int | None:
    """Up to how many positions the angles are fixed; None if the module does not say so as transformers' do."""
    if not isinstance(getattr(module, _named("original_inv_freq", kind), None), Tensor):
        return None
    if rope_type == "longrope":
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        chosen = parameters if kind is None else parameters.get(kind)
        found = chosen.get("original_max_position_embeddings") if isinstance(chosen, Mapping) else None
    else:
        found = getattr(module, "original_max_seq_len", None)
    return found if isinstance(found, int) and found > 0 else None


def _refusal(model: str, path: str, rope_type: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model} cannot be captured: {path} is a rotary embedding of type {rope_type!r}, whose angles change with the "
        "length; keys that are kept would need other angles later. Types such as 'yarn', 'linear' and 'llama3' are "
        "supported"
    )


def _named(name: str, kind: str | None) -> str:
    return name if kind is None else f"{kind}_{name}"
