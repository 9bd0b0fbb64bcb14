"""Expected Attention: what future queries will pay to each token, predicted from the queries so far."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int
from xkv_fx.runtime.attention import distance_bias, soft_cap
from xkv_fx.runtime.scorers.base import register_scorer
from xkv_fx.runtime.scorers.prompt import PromptView


@register_scorer("expected_attention")
@dataclasses.dataclass(frozen=True)
class ExpectedAttention:
    """Attention expected of the next queries, plus `epsilon`, times the L2 norm of the token's value.

    Expected Attention (arXiv 2510.00636), as in https://github.com/NVIDIA/kvpress: queries before their rotation are
    taken to be normally distributed, with the mean m and covariance C of the new ones. With R, the mean rotation over
    the next positions, and a scale s on the logits, a key k is expected to be paid in proportion to

        exp(s k R m + s^2 / 2 k R C R' k')

    which is normalised over the keys and averaged over the query heads of a KV head.

    The first `sinks` tokens, whose queries and keys are outliers, count neither in the statistics nor in the
    normalisation, and score above all others. A row with no other new tokens is judged by the queries of its sinks.
    In an extend the statistics are those of the new queries alone.

    Where a layer's logits have more to them than queries and keys: a softcap is put on the exponent, a bias of the
    distance is that of the next token, learned sinks take their share, and what the next token does not see because of
    a sliding window scores 0.

    Attributes:
        future_positions: how many of the next positions the rotation is averaged over; as many as there are left in a
            model whose rotations are a table.
        epsilon: added to the attention. The larger, the more the value decides; kvpress is evaluated with 0.01.
        sinks: how many of the first tokens are attention sinks. `Policy(sinks=...)` keeps them whatever the capacity;
            these come after the policy's sinks and recent tokens.
    """

    future_positions: int = 512
    epsilon: float = 0.0
    sinks: int = 4
    paper: ClassVar[str] = "Expected Attention, arXiv 2510.00636"
    looks_at_question: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True
    measures_attention: ClassVar[bool] = False
    independent_heads: ClassVar[bool] = True
    needs_unrotated_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not is_int(self.future_positions) or self.future_positions < 1:
            raise BudgetError(f"future_positions must be a whole number of at least 1; got {self.future_positions!r}")
        is_number = is_int(self.epsilon) or isinstance(self.epsilon, float)
        if not is_number or not 0 <= self.epsilon < math.inf:
            raise BudgetError(f"epsilon must be a number of at least 0; got {self.epsilon!r}")
        if not is_int(self.sinks) or self.sinks < 0:
            raise BudgetError(f"sinks must be a whole number of at least 0; got {self.sinks!r}")

    def __call__(self, prompt: PromptView) -> Tensor:
        ordinals = prompt.ordinals
        following = (prompt.seen + prompt.length)[:, None, None]
        first = prompt.there & (ordinals < self.sinks)
        reach = prompt.there & ~first
        if prompt.sliding_window is not None:
            reach &= ordinals > following - prompt.sliding_window

        logits = soft_cap(self._expected_logits(prompt), prompt.softcap)
        if prompt.slopes is not None:
            logits = logits + distance_bias(prompt.slopes, (following - ordinals)[:, :, None]).view_as(logits)
        paid = prompt.weights_of(logits, reach[:, :, None]).squeeze(3).mean(2)
        norm = prompt.of_values(lambda values, there: torch.linalg.vector_norm(values, dim=-1))
        scores = ((paid + self.epsilon) * norm).masked_fill(~reach, 0.0)
        above_all = scores.amax(2, keepdim=True).clamp(min=1.0) * 2 * (self.sinks - ordinals)
        return torch.where(first, above_all, scores)

    def _expected_logits(self, prompt: PromptView) -> Tensor:
        """The exponent of the formula, float32 `[rows, kv_heads, group, 1, N]`."""
        asked = self._asked(prompt)[:, None, :, None]
        expected = [_next_queries(prompt, head, asked) for head in range(prompt.k.shape[1])]

        def exponents(keys: Tensor, there: Tensor) -> Tensor:
            keys, logits = keys.masked_fill(~there[..., None], 0.0), []
            for head, (mean, covariance) in enumerate(expected):
                key = keys[:, head]
                of_head = torch.matmul(mean[:, :, 0], key.transpose(1, 2)) * prompt.scale
                spread = [(torch.matmul(key, each) * key).sum(-1) for each in covariance.unbind(1)]
                logits.append(of_head + torch.stack(spread, 1) * (prompt.scale**2 / 2))
            return torch.stack(logits, 1)

        return prompt.of_keys(exponents)[:, :, :, None]

    def _asked(self, prompt: PromptView) -> Tensor:
        """Which new tokens' queries the statistics are taken of, bool `[rows, S]`."""
        new = torch.arange(prompt.q.shape[2], device=prompt.q.device)
        valid = new < prompt.length[:, None]
        later = valid & (prompt.seen[:, None] + new >= self.sinks)
        return torch.where(later.any(1, keepdim=True), later, valid)


def _next_queries(prompt: PromptView, head: int, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Mean float32 `[rows, group, 1, key_dim]` and covariance `[rows, group, key_dim, key_dim]` of a KV head's next
    queries, rotated; one head at a time, so that no copy of all queries exists."""
    group = prompt.q.shape[1] // prompt.k.shape[1]
    members = slice(head * group, (head + 1) * group)
    mean, covariance = _statistics(prompt.unrotated_queries[:, members], asked)
    if prompt.rotation is None:
        return mean, covariance
    rotation = prompt.rotation.to(mean.dtype)
    rotation = rotation[:, members] if rotation.dim() == 4 else rotation[:, None]  # every query head may have its own
    return torch.matmul(mean, rotation), torch.matmul(torch.matmul(rotation.transpose(2, 3), covariance), rotation)


def _statistics(queries: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Mean float32 `[rows, heads, 1, dim]` and covariance `[rows, heads, dim, dim]` of some of the queries.

    Args:
        queries: `[rows, heads, S, dim]`.
        asked: which of them, bool `[rows, 1, S, 1]`; where there are none, both are 0.
    """
    count = asked.sum(2, keepdim=True).clamp(min=1)
    queries = queries.masked_fill(~asked, 0.0).float()
    mean = queries.sum(2, keepdim=True) / count
    centred = (queries - mean).masked_fill_(~asked, 0.0)
    return mean, torch.matmul(centred.transpose(2, 3), centred) / count
