"""Autocast would compute parts of a graph in another dtype than those that it was captured with."""

from __future__ import annotations

import torch

from xkv_fx.errors import BackendError


def refuse_autocast(device: torch.device) -> None:
    """Raise BackendError where `torch.autocast` is on for a device."""
    if torch.is_autocast_enabled(device.type):
        raise BackendError(
            f"torch.autocast is on for {device.type}, but xkv_fx computes in the dtype that a model has: leave the "
            "autocast block (or enter torch.autocast(..., enabled=False)), and cast the model before it is transformed"
        )
