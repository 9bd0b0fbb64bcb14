"""Settings for the tests of TensorRT, `make test-tensorrt`: a GPU to build for, where there is none.

Torch-TensorRT asks CUDA for the present device, its compute capability and its free memory, when it is imported and
when it converts; what it builds does not depend on the answers, since the tests say which GPUs to build for.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

if not torch.cuda.is_available():
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (8, 9)  # type: ignore[assignment, misc]
    torch.cuda.mem_get_info = lambda device=None: (1 << 34, 1 << 34)  # type: ignore[assignment, misc]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fail, rather than pass by skipping, where there is no TensorRT."""
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise pytest.UsageError("tests/tensorrt needs Torch-TensorRT; make test-tensorrt makes an environment with it")
