"""The divergence of next-token distributions, in the precision that it is asked for in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from xkv_fx.planning.measure.divergence import kl_divergence


def by_definition(logits: Tensor, others: Tensor) -> Tensor:
    log_p, log_q = logits.double().log_softmax(-1), others.double().log_softmax(-1)
    kl: Tensor = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl


def test_kl_of_close_distributions_keeps_its_digits_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(4, 1000, generator=generator)
    moved = logits + 1e-4 * torch.randn(4, 1000, generator=generator)
    exact = by_definition(logits, moved)
    found = kl_divergence(logits.log_softmax(-1), moved)
    assert found.dtype == torch.float64
    assert (found >= 0).all()
    np.testing.assert_allclose(found, exact, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [1e-3, 0.1, 3.0])
def test_kl_of_float64_is_exact_whatever_the_logits_are(dtype: torch.dtype, distance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(4, 1000, generator=generator)).to(dtype)
    others = (logits + distance * torch.randn(4, 1000, generator=generator)).to(dtype)
    found = kl_divergence(logits.double().log_softmax(-1), others)
    np.testing.assert_allclose(found, by_definition(logits, others), rtol=1e-9, atol=1e-14)


def test_kl_to_itself_is_nothing() -> None:
    logits = 5 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(2))
    assert not kl_divergence(logits.log_softmax(-1), logits).any()
