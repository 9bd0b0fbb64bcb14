"""The dtypes that models are measured in, and that bytes are counted in, by name."""

from __future__ import annotations

import torch

from xkv_fx.errors import BackendError

DTYPES = ("float32", "bfloat16", "float16")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        BackendError: not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise BackendError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found
