"""Attention, SnapKV's scores and the survivors of a prefill, computed the long way in float64 as an oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_weights(
    q: Tensor,
    k: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention's probabilities float64 `[query_heads, S, S]`; `q [query_heads, S, d]`, `k [kv_heads, S, d]`."""
    heads, length, _ = q.shape
    keys = k.double().repeat_interleave(heads // k.shape[0], 0)
    logits = q.double() @ keys.transpose(1, 2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    query, key = torch.arange(length)[:, None], torch.arange(length)
    reach = key <= query
    if sliding_window is not None:
        reach &= key > query - sliding_window
    logits = logits.masked_fill(~reach, float("-inf"))
    if sinks is None:
        return logits.softmax(-1)
    with_sink = torch.cat((logits, sinks.double()[:, None, None].expand(heads, length, 1)), -1)
    return with_sink.softmax(-1)[..., :-1]


def snapkv_scores(weights: Tensor, kv_heads: int, observation_window: int = 8, kernel: int = 7) -> Tensor:
    """SnapKV's scores float64 `[kv_heads, S]` of attention probabilities `[query_heads, S, S]`.

    What the newest `observation_window` queries pay to each token, the mean over a KV head's queries, averaged over
    `kernel` neighbours on the same side of the window's edge; neighbours that do not exist count as 0.
    """
    heads, length, _ = weights.shape
    group = heads // kv_heads
    first = max(0, length - observation_window)
    scores = []
    for head in range(kv_heads):
        paid = weights[head * group : (head + 1) * group, first:].double().sum(1).mean(0).tolist()
        for token in range(length):
            around = range(max(0, token - kernel // 2), min(length, token + kernel // 2 + 1))
            scores.append(sum(paid[other] for other in around if (other >= first) == (token >= first)) / kernel)
    return torch.tensor(scores, dtype=torch.float64).view(kv_heads, length)


def survivors(scores: Tensor, capacity: int, recent: int, sinks: int = 0) -> list[list[int]]:
    """The tokens that each head keeps of a prompt, ascending: the newest, the first, and the best of the others."""
    length = scores.shape[1]
    always = set(range(max(0, length - recent), length)) | set(range(min(sinks, length)))
    kept = []
    for head in scores.tolist():
        others = sorted(set(range(length)) - always, key=lambda token: -head[token])
        kept.append(sorted([*always, *others[: max(0, capacity - len(always))]]))
    return kept


def default_recent(capacity: int) -> int:
    """How many of the newest tokens the default policy keeps."""
    return min(64, max(1, capacity // 4))
