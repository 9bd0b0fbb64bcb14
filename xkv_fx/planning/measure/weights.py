"""Telling models apart by their weights."""

from __future__ import annotations

import hashlib

import torch

from xkv_fx.capture.captured import CapturedModel


def digest_of_weights(captured: CapturedModel) -> str:
    """Tells two models of one configuration apart by a few hundred numbers of each weight."""
    digest = hashlib.sha256()
    modules = (captured.prompt, *(recurrence.module for recurrence in captured.recurrences))
    named = (pair for module in modules for pair in (*module.named_parameters(), *module.named_buffers()))
    for name, weight in named:
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
