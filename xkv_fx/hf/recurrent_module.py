"""A module of a transformers model that mixes tokens by a state, alone: a pure function of its inputs and its state."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from xkv_fx.capture.export import OneGradMode
from xkv_fx.errors import UnsupportedModelError

CONV, RECURRENT = "conv", "recurrent"
Place = tuple[int, str, int]
"""Cache layer, kind (`CONV` or `RECURRENT`) and number of one state."""
PROBED = 3
"""Tokens that modules are watched with."""


@dataclasses.dataclass(frozen=True)
class StatefulCall:
    """One call of a module that fills states of a cache.

    Attributes:
        path: the module's.
        args: positional and named arguments.
        output: what it returned.
        places: the states that it has filled, all of one cache layer.
    """

    path: str
    args: tuple[Any, dict[str, Any]]
    output: Any
    places: tuple[Place, ...]


def _is_cache(leaf: Any) -> bool:
    return isinstance(leaf, Cache)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among what a module is given or returns."""
    return [leaf for leaf in pytree.tree_leaves(tree, is_leaf=_is_cache) if isinstance(leaf, Tensor)]


class LoneModule(nn.Module):
    """A module that mixes tokens by a state, with a cache of its own: `(inputs, states)` -> `(output, states)`.

    Attributes:
        example: the inputs `[1, 1, ...]` of one token.
        layer: its cache layer.
    """

    def __init__(self, mixer: nn.Module, call: StatefulCall) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer = call.places[0][0]
        self._places = call.places
        leaves, self._form = pytree.tree_flatten(call.args, is_leaf=_is_cache)
        self._leaves = [None if isinstance(leaf, Tensor | Cache) else leaf for leaf in leaves]
        self._inputs = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._caches = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Cache)]
        given = [leaves[place] for place in self._inputs]
        for tensor in (*given, *tensors_in(call.output)):
            if tensor.dim() < 2 or tensor.shape[:2] != (1, PROBED) or not tensor.is_floating_point():
                raise UnsupportedModelError(
                    f"{call.path} is given or returns a tensor of shape {list(tensor.shape)}, which is no value of "
                    "single tokens"
                )
        self.example = tuple(tensor[:, :1].detach().clone() for tensor in given)

    def forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        layer = self._layer_with(states)
        cache = Cache(layers=[layer] * (self.layer + 1))
        leaves = list(self._leaves)
        for place, given in zip(self._inputs, inputs, strict=True):
            leaves[place] = given
        for place in self._caches:
            leaves[place] = cache
        args, kwargs = pytree.tree_unflatten(leaves, self._form)
        out = torch.cat([leaf.flatten(2) for leaf in tensors_in(self.mixer(*args, **kwargs))], 2)
        return out, tuple(self._state(layer, kind)[number] for _, kind, number in self._places)

    def _layer_with(self, states: tuple[Tensor, ...] | None) -> Any:
        """A cache layer with copies of these states, which the module may change; an empty one for None."""
        layer: Any = LinearAttentionLayer(number_of_states=1 + max(number for _, _, number in self._places))
        if states is None:
            return layer
        for (_, kind, number), state in zip(self._places, states, strict=True):
            self._state(layer, kind)[number] = state.clone()
            layer.has_previous_state[number] = True
            if kind == CONV:
                layer.is_conv_states_initialized[number] = True
                layer.conv_kernel_size[number] = state.shape[-1]
                layer.dtype, layer.device = state.dtype, state.device
            else:
                layer.is_recurrent_states_initialized[number] = True
        return layer

    @staticmethod
    def _state(layer: Any, kind: str) -> Any:
        return layer.conv_states if kind == CONV else layer.recurrent_states


class OneStep(nn.Module):
    """`LoneModule` with its inputs and states in a row, as a graph takes and returns them."""

    def __init__(self, module: nn.Module, inputs: int) -> None:
        super().__init__()
        self.module = module
        self._count = inputs

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        with OneGradMode():
            out, states = self.module(given[: self._count], given[self._count :])
        return out, *states
