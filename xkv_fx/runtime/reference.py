"""A plain and slow statement of every op, by loops and in float64: the oracle that each faster form is tested against.

It shares no code with what it checks. Shapes, dtypes and arguments are those of `xkv_fx.runtime.ops`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xkv_fx.budgets import EVICTIONS
from xkv_fx.errors import BudgetError, CapacityError
from xkv_fx.runtime.slots import EMPTY, SlotPlan

Reach = Callable[[int, int, int], list[int]]
"""The keys that a query reads: `(row, kv_head, query)` -> indices into the keys."""


Bias = Callable[[int, int, int, int], float]
"""What is added to a logit: `(row, query_head, query, key)`, the key an index into the keys."""


class Token(NamedTuple):
    """A candidate for a slot of one row and KV head."""

    ordinal: int
    score: float
    key: Tensor
    value: Tensor


# Attention


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reach: Reach,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Bias | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which each query reads the keys that `reach` names.

    Args:
        q: `[rows, query_heads, S, key_dim]`.
        k, v: `[rows, kv_heads, N, key_dim]` and `[rows, kv_heads, N, value_dim]`.
        scale, softcap, sinks: as in `attention`.
        bias: what is added to the logits.

    Returns:
        the output `[rows, query_heads, S, value_dim]` and the log-sum-exp `[rows, query_heads, S]` of the logits
        without the sinks, both float64; 0 and minus infinity for a query that reads no key.
    """
    rows, query_heads, length = q.shape[:3]
    group = query_heads // k.shape[1]
    out = torch.zeros(rows, query_heads, length, v.shape[-1], dtype=torch.float64)
    lse = torch.full((rows, query_heads, length), float("-inf"), dtype=torch.float64)
    for row, head, query in itertools.product(range(rows), range(query_heads), range(length)):
        keys = reach(row, head // group, query)
        if not keys:
            continue
        sink = None if sinks is None else sinks[head]
        added = None if bias is None else [bias(row, head, query, key) for key in keys]
        weights, lse[row, head, query] = _probabilities(
            q[row, head, query], k[row, head // group, keys], scale, softcap, sink, added
        )
        out[row, head, query] = weights @ v[row, head // group, keys].double()
    return out, lse


def _probabilities(
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
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """`xkv::attention`: query i reads the keys up to i, of a sliding window the newest ones only."""

    def reach(row: int, kv_head: int, query: int) -> list[int]:
        return _causal(query, sliding_window)

    bias = _by_distance(slopes, lambda row, kv_head, query, key: query - key, q.shape[1] // k.shape[1])
    out, _ = attend(q, k, v, reach, scale, softcap, sinks, bias)
    return out.to(q.dtype)


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
    sinks: Tensor | None = None,
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
    out, _ = attend(q, keys, values, reach, scale, softcap, sinks, bias)
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
    sinks: Tensor | None = None,
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
        values = each[row, kv_head * group, query].tolist()
        return [place for place, value in enumerate(values) if value != float("-inf")]

    def bias(row: int, query_head: int, query: int, key: int) -> float:
        return float(each[row, query_head, query, key])

    out, _ = attend(q, k_cache, v_cache, reach, scale, softcap, sinks, bias)
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
    sinks: Tensor | None = None,
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
            sink = None if sinks is None else sinks[query_head]
            lost = None if slopes is None else [-float(slopes[query_head]) * (token - held[s]) for s in read]
            weights, _ = _probabilities(q[row, query_head, 0], k_cache[row, head, read], scale, softcap, sink, lost)
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


# Slots


def reference_slot(held: Sequence[int], plan: SlotPlan) -> int:
    """The slot that the next decoded token takes, when slot s holds the token with ordinal `held[s]`.

    Raises:
        CapacityError: every slot is taken, the plan may not evict, and no token has left the sliding window.
        BudgetError: the plan evicts by score, which cannot be told from the ordinals.
    """
    if EMPTY in held:
        return held.index(EMPTY)
    if plan.eviction == "ring":
        oldest_of_recent = sorted(held)[-plan.recent]
        return held.index(oldest_of_recent)
    if plan.eviction == "scored":
        raise BudgetError("eviction='scored' chooses by accumulated scores; this reference knows ordinals only")
    if plan.eviction == "append" and plan.sliding_window is not None:
        oldest = min(held)
        if oldest <= max(held) + 1 - plan.sliding_window:
            return held.index(oldest)
    raise CapacityError(f"all {len(held)} slots are taken and eviction={plan.eviction!r} never overwrites one")


def reference_ordinals(positions: Sequence[int], seen: int, base: int, plan: SlotPlan) -> list[int]:
    """What each slot of one row and KV head holds, `EMPTY` for nothing, by decoding token after token again.

    Args:
        positions: what the last prefill wrote, and for `"scored"` decode too; one ordinal for each of `plan.slots`.
        seen: valid tokens that the row has seen.
        base: how many of them it had seen by the end of the last prefill.
    """
    if plan.eviction == "scored":
        return [ordinal if slot < seen else EMPTY for slot, ordinal in enumerate(positions)]
    prefilled = min(base, plan.capacity)
    held = [positions[slot] if slot < prefilled else EMPTY for slot in range(plan.slots)]
    for token in range(base, seen):
        held[reference_slot(held, plan)] = token
    return held


# Selection


def keep(
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    length: Tensor,
    seen: Tensor,
    base: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    capacity: int,
    recent: int,
    sinks: int,
    eviction: int,
    sliding_window: int | None,
    fresh: bool,
) -> Tensor:
    """`xkv::keep`: of a layer's slots and the new tokens, `capacity` survive in each row and KV head.

    K/V of a free slot are left as they were; what they hold means nothing. Of tokens that left the sliding window,
    which nothing will read again, any may survive where room is left; here it is those of the best score.
    """
    slots = k_cache.shape[2]
    v_cache = v_cache if v_cache.shape[3] else k_cache
    plan = SlotPlan(capacity, slots, recent, sinks, EVICTIONS[eviction], sliding_window)  # type: ignore[arg-type]
    gained = torch.zeros(positions.shape, dtype=torch.float32)
    for row, head in itertools.product(range(k.shape[0]), range(k.shape[1])):
        before = 0 if fresh else int(seen[row])
        arrived = int(length[row])
        total = before + arrived
        score = ([0.0] * slots if fresh else []) + scores[row, head].tolist()
        held = [EMPTY] * slots
        if not fresh:
            held = reference_ordinals(positions[row, head].tolist(), before, int(base[row]), plan)
        old = {
            slot: Token(ordinal, score[slot], k_cache[row, head, slot].clone(), v_cache[row, head, slot].clone())
            for slot, ordinal in enumerate(held)
            if ordinal != EMPTY
        }
        new = [
            Token(before + index, score[slots + index], k[row, head, index], v[row, head, index])
            for index in range(arrived)
        ]
        if arrived == 0 and not fresh:
            for slot, token in old.items():
                gained[row, head, slot] = token.score
            continue
        survivors = _survivors([*old.values(), *new], total, plan)
        positions[row, head] = torch.arange(slots)
        for slot, token in _layout(survivors, total, plan).items():
            k_cache[row, head, slot] = token.key
            v_cache[row, head, slot] = token.value
            positions[row, head, slot] = token.ordinal
            gained[row, head, slot] = token.score
    return gained


def _survivors(candidates: list[Token], total: int, plan: SlotPlan) -> list[Token]:
    """At most `capacity` tokens, oldest first: the newest `recent`, the first `sinks`, the others by score."""
    forced = [token for token in candidates if token.ordinal >= total - plan.recent or token.ordinal < plan.sinks]
    others = [token for token in candidates if token.ordinal < total - plan.recent and token.ordinal >= plan.sinks]

    def rank(token: Token) -> tuple[bool, float]:
        out_of_window = plan.sliding_window is not None and token.ordinal <= total - plan.sliding_window
        return out_of_window, -token.score

    chosen = sorted(others, key=rank)[: plan.capacity - len(forced)]
    return sorted(forced + chosen, key=lambda token: token.ordinal)


def _layout(survivors: list[Token], total: int, plan: SlotPlan) -> dict[int, Token]:
    """The slot of each survivor; they come oldest first."""
    if plan.eviction != "ring" or total < plan.capacity:
        return dict(enumerate(survivors))
    placed = dict(enumerate(token for token in survivors if token.ordinal < total - plan.recent))
    for token in survivors:
        if token.ordinal >= total - plan.recent:
            placed[plan.capacity - plan.recent + (token.ordinal - plan.capacity) % plan.recent] = token
    return placed


# Scores


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
    sinks: Tensor | None = None,
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
                sink = None if sinks is None else sinks[query_head]
                weights, _ = _probabilities(q[row, query_head, index], keys[row, head, reached], scale, softcap, sink)
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
