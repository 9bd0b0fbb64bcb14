"""How far one next-token distribution is from another."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(log_p: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) in nats, float64 `[...]`, of q's logits `[..., vocabulary]` from p's log-probabilities.

    Computed in the dtype of `log_p`. The sum of p (r - 1 - log r) with r = q / p: its terms are not negative, so that
    float32 loses nothing where q is close to p.
    """
    difference = torch.log_softmax(logits.to(log_p.dtype), -1).sub_(log_p)
    terms = torch.expm1(difference).sub_(difference).mul_(log_p.exp())
    return terms.sum(-1).double()
