"""Marks that a model leaves in the graph while `torch.compile` traces it; the backend reads and removes them.

None of them ever runs: a graph that still holds one has not been through the backend, and is refused when it runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xkv_fx.errors import BackendError

FOREIGN_CACHE = 0
"""The reason given by a cache that is not one of the backend's."""


@torch.library.custom_op("xkv::keys_of_session", mutates_args=())
def keys_of_session(keys: Tensor, handle: Tensor) -> Tensor:
    """New keys that a cache was given.

    Args:
        keys: `[rows, kv_heads, S, key_dim]`.
        handle: a tensor of the session that owns the cache, by which the backend finds the session when the graph runs.
    """
    return _refuse()


@torch.library.custom_op("xkv::keys_with_padding", mutates_args=())
def keys_with_padding(keys: Tensor, valid: Tensor) -> Tensor:
    """New keys of which some are padding.

    Args:
        keys: `[rows, kv_heads, S, key_dim]`.
        valid: bool `[rows, S]`.
    """
    return _refuse()


@torch.library.custom_op("xkv::refused", mutates_args=())
def refused(query: Tensor, reason: int) -> Tensor:
    """An attention that cannot be captured; the backend raises the error. An error that is raised while Dynamo traces
    would only break the graph.

    Args:
        reason: `FOREIGN_CACHE`, or a number that whoever refuses can turn into an error.
    """
    return _refuse()


@keys_of_session.register_fake
def _(keys: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(keys)


@keys_with_padding.register_fake
def _(keys: Tensor, valid: Tensor) -> Tensor:
    return torch.empty_like(keys)


@refused.register_fake
def _(query: Tensor, reason: int) -> Tensor:
    return torch.empty_like(query)


def _refuse() -> Tensor:
    raise BackendError(
        "a model whose attention is 'xkv' was compiled for a cache by another backend; use backend='xkv'"
    )
