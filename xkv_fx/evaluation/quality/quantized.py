"""transformers' quantized caches, which evict nothing: for comparison at equal bytes."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import QuantizedCache

from xkv_fx.errors import BackendError, UnsupportedModelError
from xkv_fx.evaluation.quality.answering import TransformersReader


@dataclasses.dataclass(frozen=True)
class Quantized:
    """One of transformers' quantized caches.

    Attributes:
        backend: transformers' name of it.
        bits: of a key's or value's element; None for that of a backend that knows only one.
        module: what must be importable for it.
        package: the name to install that by.
        needs: what that module must have, where older ones lack it.
    """

    backend: str
    bits: int | None
    module: str
    package: str
    needs: str | None = None

    @property
    def installed(self) -> bool:
        try:
            if self.needs is not None:
                return hasattr(importlib.import_module(self.module), self.needs)
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # of a parent, too
            return False

    def new_cache(self, config: Any) -> Any:
        """An empty cache.

        Raises:
            BackendError: what it needs is not installed.
            UnsupportedModelError: a model whose layers transformers cannot quantize the cache of.
        """
        if not self.installed:
            raise BackendError(
                f"the quantized cache of the backend {self.backend!r} is not installed; pip install {self.package}"
            )
        bits = {} if self.bits is None else {"nbits": self.bits}
        axes = {"axis_key": 1, "axis_value": 1} if self.backend == "hqq" else {}  # it does not take transformers' 0
        try:
            return _Cache(self.backend, config, **bits, **axes)
        except ValueError as error:
            raise UnsupportedModelError(f"transformers cannot quantize this model's cache: {error}") from error


class _Cache(QuantizedCache):
    """One that says by name what its backend cannot hold."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        try:
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"transformers' quantized cache cannot hold keys {list(key_states.shape)} and values "
                f"{list(value_states.shape)} of layer {layer_idx}: {error}"
            ) from error
        return found


# hqq shares a scale among 64 elements, which must divide the heads, and packs int4 in pairs of such groups: three heads
# of 64 cannot hold an odd number of tokens.
QUANTIZED = {
    "int8": Quantized("hqq", 8, "hqq", "hqq"),
    "int4": Quantized("hqq", 4, "hqq", "hqq"),
    "fp8": Quantized("fp8", None, "transformers.cache_utils", "-U transformers", needs="Fp8QuantizedLayer"),
}


def quantized(name: str) -> Quantized:
    """The cache of that name.

    Raises:
        BackendError: no such cache.
    """
    if name not in QUANTIZED:
        raise BackendError(f"unknown quantized cache {name!r}; choose from {', '.join(QUANTIZED)}")
    return QUANTIZED[name]


def quantized_reader(name: str, model: Any, dtype: torch.dtype) -> TransformersReader:
    """The model itself, with the quantized cache of that name.

    Args:
        dtype: as in `cache_bytes`.

    Raises:
        BackendError, UnsupportedModelError: see `quantized` and `Quantized.new_cache`.
    """
    kind = quantized(name)
    counted = functools.partial(cache_bytes, computed_in=model.dtype, counted_in=dtype)
    return TransformersReader(model, lambda: kind.new_cache(model.config), counted)


def cache_bytes(cache: Any, computed_in: torch.dtype | None = None, counted_in: torch.dtype | None = None) -> int:
    """Bytes of every tensor that the layers of a transformers cache hold, scales and offsets included.

    Args:
        computed_in, counted_in: tensors of the first dtype, the model's, are counted as if they were of the second.
    """
    storages = {}
    for layer in cache.layers:
        for tensor in _tensors(vars(layer).values()):
            nbytes = tensor.untyped_storage().nbytes()
            if counted_in is not None and tensor.dtype == computed_in and tensor.dim():  # not a lone float32 scale
                nbytes = nbytes * counted_in.itemsize // tensor.dtype.itemsize
            storages[tensor.untyped_storage().data_ptr()] = nbytes
    return sum(storages.values())


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    """Every plain tensor in nested containers and in tensors that are made of others."""
    for value in values:
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            yield from _tensors(getattr(value, name) for name in names)
        elif isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def planned_bytes(
    name: str, model: Any, layers: Iterable[Any], prompt: int, new_tokens: int, dtype: torch.dtype | None = None
) -> int:
    """Bytes that the cache takes once a prompt was read at once and so many tokens were decoded.

    Found by filling one with random keys and values of the model's shapes.

    Args:
        dtype: as `counted_in` of `cache_bytes`.

    Raises:
        BackendError: see `Quantized.new_cache`.
        UnsupportedModelError: what it cannot hold; see `QUANTIZED`.
    """
    cache = quantized(name).new_cache(model.config)
    generator = torch.Generator().manual_seed(0)
    for index, spec in enumerate(layers):
        for tokens in (prompt, *[1] * new_tokens):
            k, v = (
                torch.randn(1, spec.kv_heads, tokens, dim, generator=generator).to(model.dtype)
                for dim in (spec.key_dim, spec.value_dim)
            )
            cache.update(k, v, index)
    return cache_bytes(cache, model.dtype, dtype)
