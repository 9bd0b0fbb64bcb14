"""These tests need an NVIDIA GPU and run only when named: `python -m pytest tests/gpu`."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fail, rather than pass by skipping, where there is no GPU."""
    if not torch.cuda.is_available():
        raise pytest.UsageError("tests/gpu needs a GPU that torch can use; there is none")
