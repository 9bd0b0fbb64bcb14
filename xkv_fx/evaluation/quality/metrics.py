"""How far a model with budgets strays from the one with its full cache."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xkv_fx.planning.measure.divergence import kl_divergence


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Per-token difference of next-token distributions.

    Attributes:
        kl: Kullback-Leibler divergence from the full cache's distribution, nats, float64 `[T]`.
        agree: whether both prefer the same token, bool `[T]`.
    """

    kl: Tensor
    agree: Tensor

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def top1_agreement(self) -> float:
        return float(self.agree.double().mean())


def divergence(full: Tensor, other: Tensor) -> Divergence:
    """Compare logits `[T, vocabulary]` with those of the full cache, in float64."""
    kl = kl_divergence(torch.log_softmax(full.double(), -1), other)
    return Divergence(kl, full.argmax(-1) == other.argmax(-1))


def compare(full: Tensor, other: Tensor, tokens: Tensor) -> dict[str, float]:
    """How logits `[T, vocabulary]` stray from those of the full cache over a given text, means over its tokens.

    Args:
        tokens: the text, int64 `[T]`.

    Returns:
        `kl` (nats), `nll_change` (the text's negative log-likelihood against that under the full cache, nats a token)
        and `agreement` (the share of tokens for which both prefer the same one).
    """
    strayed = divergence(full, other)
    log_p, log_q = (torch.log_softmax(logits.double(), -1).gather(1, tokens[:, None]) for logits in (full, other))
    change = float((log_p - log_q).mean())
    return {"kl": strayed.mean_kl, "nll_change": change, "agreement": strayed.top1_agreement}
