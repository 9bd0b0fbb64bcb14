"""Attention as loops: every op that attends, and the slot that a decoded token takes by score."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

Reach = Callable[[int, int, int], list[int]]
"""The keys that a query reads: `(row, kv_head, query)` -> indices into the keys."""


Bias = Callable[[int, int, int, int], float]
"""What is added to a logit: `(row, query_head, query, key)`, the key an index into the keys."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reach: Reach,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Bias | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which each query reads the keys that `reach` names.

    Args:
        q: `[rows, query_heads, S, key_dim]`.
        k, v: `[rows, kv_heads, N, key_dim]` and `[rows, kv_heads, N, value_dim]`.
        scale, softcap, sink_logits: as in `attention`.
        bias: what is added to the logits.

    Returns:
        the output `[rows, query_heads, S, value_dim]` and the log-sum-exp `[rows, query_heads, S]` of the logits
        without the sink logits, both float64; 0 and minus infinity for a query that reads no key.
    """
    rows, query_heads, length = q.shape[:3]
    group = query_heads // k.shape[1]
    out = torch.zeros(rows, query_heads, length, v.shape[-1], dtype=torch.float64)
    lse = torch.full((rows, query_heads, length), float("-inf"), dtype=torch.float64)
    for row, head, query in itertools.product(range(rows), range(query_heads), range(length)):
        keys = reach(row, head // group, query)
        if not keys:
            continue
        sink = None if sink_logits is None else sink_logits[head]
        added = None if bias is None else [bias(row, head, query, key) for key in keys]
        weights, lse[row, head, query] = probabilities(
            q[row, head, query], k[row, head // group, keys], scale, softcap, sink, added
        )
        out[row, head, query] = weights @ v[row, head // group, keys].double()
    return out, lse


def probabilities(
    query: Tensor,
    keys: Tensor,
    scale: float,
    softcap: float | None,
    sink: Tensor | None,
    bias: list[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """How one query's attention falls on `keys` `[N, key_dim]`, and the log-sum-exp of the logits without the sink."""
    logits = keys.double() @ query.double() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + torch.tensor(bias, dtype=torch.float64)
    denominator = logits if sink is None else torch.cat((logits, sink.double()[None]))
    return torch.exp(logits - torch.logsumexp(denominator, 0)), torch.logsumexp(logits, 0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
    index_queries: Tensor | None = None,
    index_keys: Tensor | None = None,
    index_weights: Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """`xkv::attention`: query i reads the keys up to i, of a sliding window the newest ones only, and of those what an
    indexer picks."""

    def reach(row: int, kv_head: int, query: int) -> list[int]:
        keys = _causal(query, sliding_window)
        if index_queries is None or index_keys is None or index_weights is None or top_k is None:
            return keys
        return picked(index_queries[row, :, query], index_keys[row, 0], index_weights[row, query], keys, top_k)

    bias = _by_distance(slopes, lambda row, kv_head, query, key: query - key, q.shape[1] // k.shape[1])
    out, _ = attend(q, k, v, reach, scale, softcap, sink_logits, bias)
    return out.to(q.dtype)


def picked(queries: Tensor, keys: Tensor, weights: Tensor, reachable: list[int], top_k: int) -> list[int]:
    """The `top_k` of the reachable keys that one token's indexer wants most, and those that tie with the last.

    Args:
        queries: `[index_heads, index_dim]`.
        keys: `[N, index_dim]`.
        weights: `[index_heads]`.
    """
    wanted = {}
    for key in reachable:
        products = (queries.double() @ keys[key].double()).tolist()
        wanted[key] = sum(
            weight * max(0.0, product) for weight, product in zip(weights.tolist(), products, strict=True)
        )
    least = sorted(wanted.values(), reverse=True)[:top_k][-1]
    return [key for key, value in wanted.items() if value >= least]


def extend_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
    ages: Tensor | None = None,
) -> Tensor:
    """`xkv::extend_attention`: one softmax over the slots that `mask` allows and the new keys up to the query's own."""
    slots = k_cache.shape[2]
    allowed = mask.expand(q.shape[0], k.shape[1], q.shape[2], slots)

    def reach(row: int, kv_head: int, query: int) -> list[int]:
        old = [slot for slot, may in enumerate(allowed[row, kv_head, query].tolist()) if may]
        return old + [slots + key for key in _causal(query, sliding_window)]

    def distance(row: int, kv_head: int, query: int, key: int) -> int:
        if key >= slots or ages is None:
            return query - (key - slots)
        return query + int(ages[row, kv_head, key])

    bias = _by_distance(slopes, distance, q.shape[1] // k.shape[1])
    keys = torch.cat((k_cache, k), 2)
    values = torch.cat((v_cache, v), 2) if v_cache.shape[3] else keys
    out, _ = attend(q, keys, values, reach, scale, softcap, sink_logits, bias)
    return out.to(q.dtype)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """`xkv::decode_attention`: write one token a row into its slot, then read every slot whose mask is finite; the mask
    is added to the logits."""
    rows, kv_heads, slots = k_cache.shape[:3]
    v_cache = v_cache if v_cache.shape[3] else k_cache
    for row, kv_head in itertools.product(range(rows), range(kv_heads)):
        k_cache[row, kv_head, int(slot[row])] = k[row, kv_head, 0]
        v_cache[row, kv_head, int(slot[row])] = v[row, kv_head, 0]
    group = q.shape[1] // kv_heads
    each = mask if mask.shape[1] == q.shape[1] else mask.expand(rows, kv_heads, 1, slots).repeat_interleave(group, 1)

    def reach(row: int, kv_head: int, query: int) -> list[int]:
        values = each[row, kv_head * group : (kv_head + 1) * group, query].amax(0).tolist()
        return [place for place, value in enumerate(values) if value != float("-inf")]

    def bias(row: int, query_head: int, query: int, key: int) -> float:
        return float(each[row, query_head, query, key])

    out, _ = attend(q, k_cache, v_cache, reach, scale, softcap, sink_logits, bias)
    return out.to(q.dtype)


def decode_scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scores: Tensor,
    seen: Tensor,
    scale: float,
    recent: int,
    sink_tokens: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """`xkv::decode_scored`: each KV head gives the token a slot, reads what its slots hold, and adds to each slot's
    score the attention that it was paid, averaged over the head's queries."""
    rows, kv_heads, slots = positions.shape
    group = q.shape[1] // kv_heads
    v_cache = v_cache if v_cache.shape[3] else k_cache
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for row, head in itertools.product(range(rows), range(kv_heads)):
        token = int(seen[row])
        held = positions[row, head].tolist()
        slot = _slot_by_score(held, scores[row, head].tolist(), token, recent, sink_tokens, sliding_window)
        k_cache[row, head, slot], v_cache[row, head, slot] = k[row, head, 0], v[row, head, 0]
        positions[row, head, slot] = held[slot] = token
        scores[row, head, slot] = 0.0

        used = range(min(token + 1, slots))
        read = [s for s in used if sliding_window is None or token - held[s] < sliding_window]
        for query_head in range(head * group, (head + 1) * group):
            sink = None if sink_logits is None else sink_logits[query_head]
            lost = None if slopes is None else [-float(slopes[query_head]) * (token - held[s]) for s in read]
            weights, _ = probabilities(q[row, query_head, 0], k_cache[row, head, read], scale, softcap, sink, lost)
            out[row, query_head, 0] = weights @ v_cache[row, head, read].double()
            scores[row, head, read] += (weights / group).float()
    return out.to(q.dtype)


def _slot_by_score(
    held: list[int], scores: list[float], token: int, recent: int, sink_tokens: int, sliding_window: int | None
) -> int:
    """The slot of one KV head that token number `token` takes: a free one; else one that left the sliding window; else
    that of the least score which is neither a sink nor among the newest `recent` tokens, `token` counted."""
    if token < len(held):
        return token
    if sliding_window is not None:
        for slot, ordinal in enumerate(held):
            if token - ordinal >= sliding_window:
                return slot
    may_go = [s for s, ordinal in enumerate(held) if ordinal >= sink_tokens and token - ordinal >= recent]
    return min(may_go, key=lambda slot: scores[slot])


def _by_distance(slopes: Tensor | None, distance: Callable[[int, int, int, int], int], group: int) -> Bias | None:
    """The bias of slopes `[query_heads]`, from `distance(row, kv_head, query, key)` in tokens."""
    if slopes is None:
        return None
    values = slopes.tolist()
    return lambda row, head, query, key: -values[head] * distance(row, head // group, query, key)


def _causal(query: int, sliding_window: int | None) -> list[int]:
    return [key for key in range(query + 1) if sliding_window is None or query - key < sliding_window]
