"""Whether the weights that graphs share with the user's model are still those that were captured.

Torch counts what is done to a tensor in place, but not what is done through its `.data`, as peft does when it merges
adapters. So a few numbers of each weight are kept besides, and compared before each prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from xkv_fx.errors import ModelMismatchError

SAMPLES = 32
"""How many numbers of each weight are kept at most."""
_SAMPLED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class SharedWeights:
    """The weights of a captured model as they were when this was made.

    Args:
        model: the model's name, for errors.
        weights: by name; tensor subclasses are left out, since they keep their data in other tensors.
    """

    def __init__(self, model: str, weights: Mapping[str, Tensor]) -> None:
        self._model = model
        # inference tensors cannot be changed outside of inference mode, and count nothing
        plain = {name: weight for name, weight in weights.items() if type(weight) in (Tensor, nn.Parameter)}
        self._weights = {name: weight for name, weight in plain.items() if not weight.is_inference()}
        self._watched = tuple(self._weights.values())
        self._kinds = tuple((weight.dtype, weight.device) for weight in self._watched)
        self._versions = tuple(weight._version for weight in self._watched)
        self._places = self._places_now()
        self._samples = _samples(self._watched)
        self._values = _values(self._samples)

    def check(self) -> None:
        """Compare versions, places and samples with those kept.

        Raises:
            ModelMismatchError: a weight was changed, moved or cast.
        """
        if sum(weight._version for weight in self._watched) != sum(self._versions):
            raise self._error(self._versions, [weight._version for weight in self._watched], "changed in place")
        if self._places_now() != self._places:  # other tensors have taken their places, perhaps with the same numbers
            kinds = [(weight.dtype, weight.device) for weight in self._watched]
            if tuple(kinds) != self._kinds:
                raise self._error(self._kinds, kinds, "moved or cast")
            self._samples, self._places = _samples(self._watched), self._places_now()
        if not _same(_values(self._samples), self._values):
            raise ModelMismatchError(self._message("its weights were", "changed in place"))

    def _places_now(self) -> tuple[int, ...]:
        return tuple(weight.data_ptr() for weight in self._watched)

    def _error(self, before: Iterable[object], now: Iterable[object], what: str) -> ModelMismatchError:
        changed = [name for name, old, new in zip(self._weights, before, now, strict=True) if old != new]
        return ModelMismatchError(self._message(f"{len(changed)} of its weights, such as {changed[0]}, were", what))

    def _message(self, which: str, what: str) -> str:
        return (
            f"{self._model}: {which} {what} after the model was transformed, which shares them; transform it again "
            "(or, to go on with the weights as they were, transform a copy before changing the model)"
        )


def _samples(weights: Iterable[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    """Views of a few numbers of each weight, along its diagonal."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for weight in weights:
        if weight.dtype not in _SAMPLED or not weight.numel():
            continue
        part = weight.detach()
        while part.dim() > 1:
            part = part.diagonal(dim1=-2, dim2=-1)
        part = part.reshape(-1)
        found.setdefault(weight.dtype, []).append(part[:: max(1, -(-len(part) // SAMPLES))])
    return found


def _values(samples: Mapping[torch.dtype, list[Tensor]]) -> dict[torch.dtype, Tensor]:
    """The numbers as bytes, so that NaNs compare equal too."""
    with torch.no_grad():
        return {dtype: torch.cat(parts).view(torch.uint8) for dtype, parts in samples.items()}


def _same(values: Mapping[torch.dtype, Tensor], others: Mapping[torch.dtype, Tensor]) -> bool:
    return all(torch.equal(value, others[dtype]) for dtype, value in values.items())
