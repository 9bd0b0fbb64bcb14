"""Importing transformers' models without what other libraries log meanwhile.

With its models transformers imports torchao, if that is installed, which logs two warnings about kernels for GPUs that
are not there, and lets torch log two more. Users cannot act on them. What is logged before or afterwards is left alone.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

NOISY = ("torchao", "torch.utils._pytree")


@contextmanager
def without_warnings_of(names: tuple[str, ...]) -> Iterator[None]:
    """Let these loggers log nothing below errors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def import_quietly() -> None:
    """Import transformers' models; nothing happens if the user's program has done so."""
    with without_warnings_of(NOISY):
        importlib.import_module("transformers.modeling_utils")
