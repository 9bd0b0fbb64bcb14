"""Which model a graph of Dynamo's is running for.

To Dynamo weights are inputs, so that one graph serves all models of a class that are compiled with equal options. The
weights of a call tell which model it belongs to.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.hf.inspect import check_model


class ModelsOfCalls:
    """The models that one graph has run for.

    Args:
        model: the one whose call made Dynamo trace the graph.
        weights: indices of weights among the graph's inputs.
        inputs: those of that call.
    """

    def __init__(self, model: nn.Module, weights: Iterable[int], inputs: Sequence[Any]) -> None:
        own = _tensors_of(model)
        self._weights = [index for index in weights if id(inputs[index]) in own]  # the others belong to code around it
        self._seen: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Tensor]]] = weakref.WeakKeyDictionary()
        self._seen[model] = self._references(inputs)

    def holds(self, model: nn.Module | None, inputs: Sequence[Any]) -> bool:
        """Whether the weights of a call are this model's."""
        if model is None or not self._weights:
            return False
        seen = self._seen.get(model, [])
        if seen and all(known() is inputs[index] for known, index in zip(seen, self._weights, strict=True)):
            return True
        own = _tensors_of(model)
        if not all(id(inputs[index]) in own for index in self._weights):
            return False
        self._seen[model] = self._references(inputs)
        return True

    def calling(self, inputs: Sequence[Any]) -> nn.Module | None:
        """The model of the call that is running; None where it is not found."""
        known = next((model for model in list(self._seen) if self.holds(model, inputs)), None)
        return known or next((model for model in _models_on_the_stack() if self.holds(model, inputs)), None)

    def _references(self, inputs: Sequence[Any]) -> list[weakref.ref[Tensor]]:
        return [weakref.ref(inputs[index]) for index in self._weights]


def _tensors_of(model: nn.Module) -> set[int]:
    return {id(tensor) for tensor in (*model.parameters(), *model.buffers())}


def _models_on_the_stack() -> list[nn.Module]:
    """The models whose forward is running, innermost first."""
    found: list[nn.Module] = []
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and hasattr(module, "config"):
            with contextlib.suppress(UnsupportedModelError):  # a part of a model
                found.append(check_model(module))
        frame = frame.f_back
    return found
