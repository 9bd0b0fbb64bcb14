"""Which calls over slots in the model's dtype the CPU kernel serves, chosen on fake tensors."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import choose, graph, mode  # noqa: F401  (a fixture)

from xkv_fx.runtime import ops  # noqa: F401  (registers the ops)

HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("dtypes", "size", "mask_heads", "why"),
    [
        ((torch.float64,) * 3, 16, 1, "dtype torch.float64"),
        ((torch.float32, HALF, HALF), 16, 1, "queries, keys and values of different dtypes"),
        ((HALF, HALF, torch.float32), 16, 1, "queries, keys and values of different dtypes"),
        ((HALF, torch.float32, HALF), 16, 1, "queries, keys and values of different dtypes"),
        ((HALF,) * 3, 24, 1, "head sizes 24 and 24 are not multiples of 16"),
        ((HALF,) * 3, 16, 6, "biased attention"),
    ],
    ids=["double", "queries", "cache", "tokens", "24", "bias by head"],
)
def test_what_it_does_not_serve(dtypes: tuple[torch.dtype, ...], size: int, mask_heads: int, why: str) -> None:
    asked, given, cached = dtypes
    q, k, cache = (
        torch.empty(2, heads, count, size, dtype=dtype)
        for heads, count, dtype in ((6, 1, asked), (3, 1, given), (3, 30, cached))
    )
    slot, mask = torch.empty(2, dtype=torch.int64), torch.empty(2, mask_heads, 1, 30, dtype=cached)

    def decode(*values: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.xkv.decode_attention(*values, 0.1)
        return out

    assert f"CPU kernel: {why}" in choose(graph(decode, q, k, k.clone(), cache, cache.clone(), slot, mask))
