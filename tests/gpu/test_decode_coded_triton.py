"""The Triton decode kernel over slots of fewer bits on a GPU: the cases that the interpreter runs elsewhere, and shapes
of real models."""

from __future__ import annotations

import pytest
import torch
from triton_cases import masked_inputs
from triton_coded_cases import *  # noqa: F403
from triton_coded_cases import check_coded

from xkv_fx.runtime.kernels.decode_triton import plan_launch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("names", [("int8", "int8"), ("int4", "int4"), ("fp8", "int4")], ids="/".join)
@pytest.mark.parametrize(
    ("heads", "dims"), [((32, 8), (128, 128)), ((6, 2), (96, 96)), ((16, 1), (256, 256)), ((9, 3), (64, 64))], ids=str
)
def test_shapes_of_real_models(
    heads: tuple[int, int], dims: tuple[int, int], names: tuple[str, str], dtype: torch.dtype
) -> None:
    for slots in (1, 500, 3000):
        launch = plan_launch(2, heads[1], slots, *dims, dtype, processors=132)
        check_coded(masked_inputs(heads, dims, 2, slots, dtype, 0, "shared"), names, launch)
