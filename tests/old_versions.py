"""What the oldest versions of torch and transformers that are promised do not have (`make test-lowest`)."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version

OLD_TORCH = Version(torch.__version__) < Version("2.12")
OLD_TRANSFORMERS = Version(transformers.__version__) < Version("5.23")

FP8 = () if OLD_TRANSFORMERS else ("fp8",)
needs_fp8 = pytest.mark.skipif(OLD_TRANSFORMERS, reason="older versions of transformers have no fp8 cache")
