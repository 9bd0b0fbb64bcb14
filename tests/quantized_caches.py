"""transformers' fp8 cache, which the oldest transformers that is promised does not have."""

from __future__ import annotations

import pytest

from xkv_fx.evaluation.quantized import QUANTIZED

FP8 = ("fp8",) if QUANTIZED["fp8"].installed else ()
needs_fp8 = pytest.mark.skipif(not FP8, reason="transformers has no fp8 cache yet")
