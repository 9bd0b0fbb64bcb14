"""SnapKV's score of each token."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from oracles.attention_loops import probabilities
from xkv_fx.runtime.slots import EMPTY


def snapkv_scores_reference(
    q: Tensor,
    k: Tensor,
    length: Tensor,
    scale: float,
    seen: Tensor | None = None,
    old_k: Tensor | None = None,
    old_ordinals: Tensor | None = None,
    observation_window: int = 8,
    kernel: int = 7,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """SnapKV's score of each candidate: a layer's slots, if there are any, followed by the S new tokens.

    The newest `observation_window` tokens ask: those of them that are new give the attention that they pay, which is
    summed over them, averaged over the query heads of a KV head, and average-pooled along the tokens, oldest first,
    with zeros beyond the ends. Tokens inside and before the observation window are pooled apart. SnapKV (arXiv
    2404.14469, section 4), with XKV's numbers (arXiv 2412.05896).

    Args:
        q: `[rows, query_heads, S, key_dim]`.
        k: `[rows, kv_heads, S, key_dim]`.
        length: int64 `[rows]`, valid ones among the S tokens; they come first.
        seen: int64 `[rows]`, tokens seen before these; 0 when None.
        old_k: what the slots hold, `[rows, kv_heads, slots, key_dim]`; None in a fresh prefill.
        old_ordinals: int64 `[rows, kv_heads, slots]`, `EMPTY` for a free slot; None in a fresh prefill.

    Returns:
        float64 `[rows, kv_heads, slots + S]`; 0 for a candidate that is not there.
    """
    rows, kv_heads, new = k.shape[:3]
    group = q.shape[1] // kv_heads
    keys = k if old_k is None else torch.cat((old_k, k), 2)
    scores = torch.zeros(rows, kv_heads, keys.shape[2], dtype=torch.float64)
    for row, head in itertools.product(range(rows), range(kv_heads)):
        before = 0 if seen is None else int(seen[row])
        arrived = int(length[row])
        ordinals = [] if old_ordinals is None else old_ordinals[row, head].tolist()
        ordinals += [before + index if index < arrived else EMPTY for index in range(new)]

        mass = [0.0] * len(ordinals)
        for index in range(max(0, arrived - observation_window), arrived):
            query = before + index
            reached = [n for n, key in enumerate(ordinals) if key != EMPTY and key <= query]
            if sliding_window is not None:
                reached = [n for n in reached if query - ordinals[n] < sliding_window]
            for query_head in range(head * group, (head + 1) * group):
                sink = None if sink_logits is None else sink_logits[query_head]
                weights, _ = probabilities(q[row, query_head, index], keys[row, head, reached], scale, softcap, sink)
                for n, weight in zip(reached, weights.tolist(), strict=True):
                    mass[n] += weight / group

        first_observed = before + arrived - observation_window
        there = sorted((n for n in range(len(ordinals)) if ordinals[n] != EMPTY), key=lambda n: ordinals[n])
        for part in (
            [n for n in there if ordinals[n] < first_observed],
            [n for n in there if ordinals[n] >= first_observed],
        ):
            for place, n in enumerate(part):
                neighbours = part[max(0, place - kernel // 2) : place + kernel // 2 + 1]
                scores[row, head, n] = sum(mass[m] for m in neighbours) / kernel
    return scores
