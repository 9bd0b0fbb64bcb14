"""All backends, one row each. Their names are known without torch, for the help of commands."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from xkv_fx.errors import BackendError, did_you_mean

if TYPE_CHECKING:
    from xkv_fx.lowering.backends.backend import Backend

_HOMES = {
    "inductor": "xkv_fx.lowering.backends.inductor",
    "eager": "xkv_fx.lowering.backends.eager",
}
"""Where each has its `BACKEND`."""
BACKENDS = tuple(_HOMES)


def backend_of(name: str) -> Backend:
    """The backend of that name.

    Raises:
        BackendError: there is none.
    """
    if name not in BACKENDS:
        meant = did_you_mean(name, BACKENDS)
        raise BackendError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}{meant}")
    backend: Backend = importlib.import_module(_HOMES[name]).BACKEND
    return backend
