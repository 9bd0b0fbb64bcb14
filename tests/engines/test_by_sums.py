"""Linear layers and decode attention as sums: what torch's linear and the reference op give."""

from __future__ import annotations

from typing import Any

import oracles as reference
import pytest
import torch
from triton_cases import assert_same, copies, masked_inputs

from xkv_fx.engines.by_sums import MOST, decode_attention, linear

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, MOST, MOST + 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_torchs(dtype: torch.dtype, rows: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 1, 40, dtype=dtype), torch.randn(24, 40, dtype=dtype)
    bias = torch.randn(24, dtype=dtype) if with_bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    made = linear(x, weight, bias)
    assert (made.dtype, made.shape) == (dtype, exact.shape)
    error = torch.nn.functional.linear(x, weight, bias).double().sub(exact).abs().max()
    assert made.double().sub(exact).abs().max() <= max(2 * error, 40 * torch.finfo(dtype).eps)


def test_linear_of_rows_in_every_shape() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    for shape in [(40,), (2, 40), (2, 1, 40), (2, 3, 1, 40), (0, 40)]:
        x = torch.ones(shape)
        torch.testing.assert_close(linear(x, weight), torch.nn.functional.linear(x, weight), atol=1e-4, rtol=0)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 4), (MOST + 1, 1)], ids=str)
@pytest.mark.parametrize("masking", ["shared", "each", "bias"])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sink_logits": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_attention_is_the_reference(
    heads: tuple[int, int], masking: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    if "sink_logits" in options:
        options = {"sink_logits": torch.full((heads[0],), options["sink_logits"])}
    args = masked_inputs(heads, (16, 8), 3, 33, dtype, 0, masking)
    tested, expected = copies(args), copies(args)
    assert_same(
        decode_attention(*tested, **options), tested, reference.decode_attention(*expected, **options), expected
    )
