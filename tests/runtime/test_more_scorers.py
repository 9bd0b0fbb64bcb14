"""The scorers besides SnapKV: each against its formula by loops, and what is then kept against a plain choice."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from oracles import snapkv_scores_reference
from runtime_inputs import HEADS, before_rotation, random_qkv
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from xkv_fx.errors import BudgetError
from xkv_fx.policy import Policy
from xkv_fx.runtime import scorers
from xkv_fx.runtime.form import AttentionForm
from xkv_fx.runtime.scorers import (
    H2O,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    PromptView,
    Random,
    Reconstruction,
    Scorer,
    SnapKV,
    Streaming,
    ValueNorm,
    accumulated,
    base,
    future_positions,
    make_scorer,
    register_scorer,
    rescore_tokens,
    score_tokens,
    scorer_names,
    scorer_of,
)
from xkv_fx.runtime.selection import select_survivors
from xkv_fx.runtime.slots import EMPTY, SlotPlan

SCALE = 0.35
DIMS = (8, 6)
ATTENTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 1.5},
    {"sliding_window": 5},
    {"sink_logits": True},
    {"softcap": 1.5, "sliding_window": 12, "sink_logits": True},
]


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a scorer is given, in the plainest form: the slots and their ordinals, and the new tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    length: Tensor
    seen: Tensor
    old_k: Tensor
    old_v: Tensor
    old_ordinals: Tensor
    attention: dict[str, Any]
    unrotated: Tensor
    rotation: Tensor

    def given(self, scorer: Scorer) -> dict[str, Any]:
        """What a scorer that needs it is given about queries before rotation."""
        needs = getattr(scorer, "needs_unrotated_queries", False)
        return {"unrotated": self.unrotated, "rotation": self.rotation} if needs else {}

    @property
    def keys(self) -> Tensor:
        return torch.cat((self.old_k, self.k), 2).double()

    @property
    def values(self) -> Tensor:
        return torch.cat((self.old_v, self.v), 2).double()

    def ordinals(self, row: int, head: int) -> dict[int, int]:
        """The candidates that are there: their places and ordinals."""
        held = dict(enumerate(self.old_ordinals[row, head].tolist()))
        slots, before = len(held), int(self.seen[row])
        new = {slots + index: before + index for index in range(int(self.length[row]))}
        return {place: ordinal for place, ordinal in {**held, **new}.items() if ordinal != EMPTY}

    def paid(self, row: int, query_head: int, index: int) -> dict[int, float]:
        """What the new token of that index pays to each place that it reaches."""
        head = query_head // (self.q.shape[1] // self.k.shape[1])
        query = int(self.seen[row]) + index
        sliding_window = self.attention.get("sliding_window") or math.inf
        reached = [
            place
            for place, ordinal in self.ordinals(row, head).items()
            if ordinal <= query and query - ordinal < sliding_window
        ]
        logits = self.keys[row, head, reached] @ self.q[row, query_head, index].double() * SCALE
        softcap, sinks = self.attention.get("softcap"), self.attention.get("sink_logits")
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        raised = torch.exp(logits)
        total = raised.sum() if sinks is None else raised.sum() + math.exp(sinks[query_head])
        return dict(zip(reached, (raised / total).tolist(), strict=True))

    def each_head(self) -> itertools.product[tuple[int, int]]:
        return itertools.product(range(self.k.shape[0]), range(self.k.shape[1]))

    def zeros(self) -> Tensor:
        return torch.zeros(self.keys.shape[:3], dtype=torch.float64)


# Oracles: float64 `[rows, kv_heads, slots + S]`


def h2o(layer: Layer) -> Tensor:
    scores = layer.zeros()
    group = layer.q.shape[1] // layer.k.shape[1]
    for row, head in layer.each_head():
        for query_head in range(head * group, (head + 1) * group):
            for index in range(int(layer.length[row])):
                for place, weight in layer.paid(row, query_head, index).items():
                    scores[row, head, place] += weight / group
    return scores


def tova(layer: Layer) -> Tensor:
    scores = layer.zeros()
    heads, group = layer.q.shape[1], layer.q.shape[1] // layer.k.shape[1]
    for row in range(layer.q.shape[0]):
        of_token: dict[int, float] = {}
        for query_head in range(heads if layer.length[row] > 0 else 0):
            ordinals = layer.ordinals(row, query_head // group)
            for place, weight in layer.paid(row, query_head, int(layer.length[row]) - 1).items():
                of_token[ordinals[place]] = of_token.get(ordinals[place], 0.0) + weight / heads
        for head in range(layer.k.shape[1]):
            for place, ordinal in layer.ordinals(row, head).items():
                scores[row, head, place] = of_token.get(ordinal, 0.0)
    return scores


def streaming(layer: Layer, sinks: int = 4) -> Tensor:
    scores = layer.zeros()
    for row, head in layer.each_head():
        for place, ordinal in layer.ordinals(row, head).items():
            total = int(layer.seen[row] + layer.length[row])
            scores[row, head, place] = ordinal if ordinal >= sinks else total + sinks - ordinal
    return scores


def key_norm(layer: Layer) -> Tensor:
    scores = layer.zeros()
    for row, head in layer.each_head():
        for place in layer.ordinals(row, head):
            scores[row, head, place] = -math.hypot(*layer.keys[row, head, place].tolist())
    return scores


def key_diff(layer: Layer) -> Tensor:
    scores = layer.zeros()
    for row, head in layer.each_head():
        keys = {place: layer.keys[row, head, place] for place in layer.ordinals(row, head)}
        mean = sum((key / math.hypot(*key.tolist()) for key in keys.values()), torch.zeros(DIMS[0]).double())
        mean = mean / max(1, len(keys))
        for place, key in keys.items():
            cosine = float(key @ mean) / math.hypot(*key.tolist()) / math.hypot(*mean.tolist())
            scores[row, head, place] = -cosine
    return scores


def chance(layer: Layer, seed: int = 0) -> Tensor:
    def mix(number: int) -> int:
        number = (number + 0x9E3779B9) % 2**32
        number = ((number ^ number >> 16) * 0x2C1B3C6D) % 2**32
        number = ((number ^ number >> 15) * 0x297A2D39) % 2**32
        return number ^ number >> 16

    scores = layer.zeros()
    for row, head in layer.each_head():
        for place, ordinal in layer.ordinals(row, head).items():
            scores[row, head, place] = mix(mix(mix(seed) ^ head) ^ ordinal) // 256 / 2**24
    return scores


def snapkv(layer: Layer) -> Tensor:
    return snapkv_scores_reference(
        layer.q, layer.k, layer.length, SCALE, layer.seen, layer.old_k, layer.old_ordinals, **layer.attention
    )


def expected_attention(layer: Layer, sinks: int = 4, epsilon: float = 0.0) -> Tensor:
    scores = layer.zeros()
    group = layer.q.shape[1] // layer.k.shape[1]
    softcap, learned = layer.attention.get("softcap"), layer.attention.get("sink_logits")
    sliding_window = layer.attention.get("sliding_window") or math.inf
    for row, head in layer.each_head():
        gained, before = int(layer.length[row]), int(layer.seen[row])
        ordinals = layer.ordinals(row, head)
        reached = [n for n, o in ordinals.items() if o >= sinks and before + gained - o < sliding_window]
        asked = [index for index in range(gained) if before + index >= sinks] or list(range(gained))
        rotation = layer.rotation[row].double()
        for query_head in range(head * group, (head + 1) * group):
            queries = layer.unrotated[row, query_head, asked].double()
            mean = queries.sum(0) / max(1, len(asked))
            covariance = sum((torch.outer(q - mean, q - mean) for q in queries), torch.zeros(DIMS[0], DIMS[0]).double())
            covariance = covariance / max(1, len(asked))
            raised = {}
            for place in reached:
                key = rotation @ layer.keys[row, head, place]
                logit = float(SCALE * key @ mean + SCALE**2 / 2 * key @ covariance @ key)
                raised[place] = math.exp(logit if softcap is None else softcap * math.tanh(logit / softcap))
            total = sum(raised.values()) + (0.0 if learned is None else math.exp(learned[query_head]))
            for place, share in raised.items():
                scores[row, head, place] += share / total / group
        for place in reached:
            scores[row, head, place] += epsilon
            scores[row, head, place] *= math.hypot(*layer.values[row, head, place].tolist())
        most = max([1.0, *scores[row, head, reached].tolist()])
        for place, ordinal in ordinals.items():
            if ordinal < sinks:
                scores[row, head, place] = 2 * most * (sinks - ordinal)
    return scores


def value_norm(layer: Layer, of: Callable[[Layer], Tensor] = snapkv, power: int = 1) -> Tensor:
    scores = of(layer)
    for row, head in layer.each_head():
        for place in layer.ordinals(row, head):
            sizes = [abs(element) ** power for element in layer.values[row, head, place].tolist()]
            scores[row, head, place] *= sum(sizes) ** (1 / power)
    return scores


CASES: dict[str, tuple[Scorer, Callable[[Layer], Tensor]]] = {
    "h2o": (H2O(), h2o),
    "tova": (TOVA(), tova),
    "streaming": (Streaming(), streaming),
    "streaming without sinks": (Streaming(0), lambda layer: streaming(layer, 0)),
    "key_norm": (KeyNorm(), key_norm),
    "key_diff": (KeyDiff(), key_diff),
    "random": (Random(), chance),
    "random of another seed": (Random(2**32 - 1), lambda layer: chance(layer, 2**32 - 1)),
    "expected_attention": (ExpectedAttention(), expected_attention),
    "expected_attention with epsilon": (ExpectedAttention(1, 0.1, 0), lambda layer: expected_attention(layer, 0, 0.1)),
    "value_norm": (ValueNorm(), value_norm),
    "value_norm of tova, L2": (ValueNorm("tova", 2), lambda layer: value_norm(layer, tova, 2)),
}
each_case = pytest.mark.parametrize("case", CASES)


# Inputs


def make_layer(
    heads: tuple[int, int],
    length: Tensor,
    seen: Tensor,
    old_ordinals: Tensor,
    attention: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
) -> Layer:
    """Random tensors. Free slots and padding hold what no score may be made of."""
    rows, new = len(length), max(1, int(length.max())) + padding
    q, k, v = random_qkv(heads, new, DIMS, rows, dtype)
    _, old_k, old_v = random_qkv(heads, 1, DIMS, rows, dtype, keys=old_ordinals.shape[2])
    behind = (torch.arange(new) >= length[:, None])[:, None, :, None]
    free = (old_ordinals == EMPTY)[..., None]
    q, k, v = (tensor.masked_fill(behind, float("nan")) for tensor in (q, k, v))
    old_k, old_v = (tensor.masked_fill(free, float("inf")) for tensor in (old_k, old_v))
    if attention.get("sink_logits"):
        attention = {**attention, "sink_logits": torch.randn(heads[0])}
    unrotated = torch.randn(q.shape).to(dtype).masked_fill(behind, float("nan"))
    rotation = torch.stack([mean_rotation(int(newest), 20) for newest in seen + length - 1])
    return Layer(q, k, v, length, seen, old_k, old_v, old_ordinals, attention, unrotated, rotation)


@functools.cache
def mean_rotation(newest: int, count: int) -> Tensor:
    """The mean over the next positions of the matrix that queries are multiplied by from the right: `[8, 8]`; it turns
    elements 2 i and 2 i + 1 by an angle of 10 ** -i for each position."""
    total = torch.zeros(DIMS[0], DIMS[0])
    for position in range(newest + 1, newest + 1 + count):
        for pair in range(DIMS[0] // 2):
            cos, sin = math.cos(position * 10**-pair), math.sin(position * 10**-pair)
            total[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] += torch.tensor([[cos, sin], [-sin, cos]])
    return total / count


def prefilled(first: Tensor, plan: SlotPlan, kv_heads: int) -> Tensor:
    """Positions after a prefill of `first` tokens whose scores were random, other ones in each head."""
    new = max(plan.capacity, int(first.max()))
    ordinals = torch.full((len(first), kv_heads, plan.slots), EMPTY)
    scores = torch.rand(len(first), kv_heads, plan.slots + new)
    _, kept = select_survivors(scores, ordinals, torch.zeros_like(first), first, plan)
    positions = torch.arange(plan.slots).expand(ordinals.shape).clone()
    positions[:, :, : plan.capacity] = torch.where(kept == EMPTY, positions[:, :, : plan.capacity], kept)
    return positions.int()


# Comparisons


def assert_scores(got: Tensor, expected: Tensor, layer: Layer) -> None:
    """Compare candidates that are there; others may have any finite score, since they are never kept."""
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert got.isfinite().all()
    for row, head in layer.each_head():
        there = list(layer.ordinals(row, head))
        torch.testing.assert_close(got[row, head, there].double(), expected[row, head, there], rtol=1e-5, atol=1e-6)


def assert_kept(got: Tensor, expected: Tensor, layer: Layer, plan: SlotPlan) -> None:
    """The tokens that the runtime keeps by the scores `got` are those that a plain choice keeps by `expected`."""
    _, kept = select_survivors(got, layer.old_ordinals, layer.seen, layer.length, plan)
    for row, head in layer.each_head():
        if layer.length[row] == 0:
            continue  # such a row stays as it is, whatever the scores
        total = int(layer.seen[row] + layer.length[row])
        candidates = layer.ordinals(row, head)
        always = {n for n in candidates.values() if n >= total - plan.recent or n < plan.sinks}
        useful = {n for n in candidates.values() if plan.sliding_window is None or n > total - plan.sliding_window}
        best = sorted(candidates, key=lambda place: -float(expected[row, head, place]))
        ranked = [candidates[place] for place in best if candidates[place] in useful - always]
        chosen = always | set(ranked[: plan.capacity - len(always)])
        held = set(kept[row, head].tolist()) - {EMPTY}
        assert held & (useful | always) == chosen, (row, head)
        assert len(held) == min(plan.capacity, len(candidates))


# Each scorer against its formula


@each_case
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
@pytest.mark.parametrize(("lengths", "padding"), [([1, 1], 0), ([17, 17], 0), ([6, 0, 14], 3)], ids=str)
def test_fresh_prompt(
    case: str, heads: tuple[int, int], attention: dict[str, Any], lengths: list[int], padding: int
) -> None:
    scorer, oracle = CASES[case]
    length = torch.tensor(lengths)
    none = torch.full((len(lengths), heads[1], 0), EMPTY)
    layer = make_layer(heads, length, torch.zeros_like(length), none, attention, padding=padding)
    got = score_tokens(
        layer.q, layer.k, layer.v if scorer.reads_values else None, length, None, SCALE, scorer, **layer.attention,
        **layer.given(scorer),
    )  # fmt: skip
    expected = oracle(layer)
    assert_scores(got, expected, layer)
    if layer.k.shape[2] >= 8:
        assert_kept(got, expected, layer, SlotPlan(8, 8, 2, 1, "ring", attention.get("sliding_window")))


@each_case
@given(
    heads=st.sampled_from(HEADS),
    attention=st.sampled_from(ATTENTIONS),
    plan=st.sampled_from(
        [
            SlotPlan(11, 11, 3, 0, "ring"),
            SlotPlan(7, 12, 2, 1, "append"),
            SlotPlan(9, 9, 9, 0, "ring"),
            SlotPlan(8, 8, 3, 2, "scored"),
        ]
    ),
    turns=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 4), st.integers(0, 14)), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
@examples(25)
def test_old_slots_and_new_tokens(
    case: str,
    heads: tuple[int, int],
    attention: dict[str, Any],
    plan: SlotPlan,
    turns: list[tuple[int, int, int]],
    padding: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Each row has seen so many tokens at its last prefill, decoded so many since, and gains so many."""
    torch.manual_seed(seed)
    scorer, oracle = CASES[case]
    sliding_window = attention.get("sliding_window")
    if sliding_window is not None:
        plan = dataclasses.replace(plan, sliding_window=max(sliding_window, plan.capacity))
        attention = {**attention, "sliding_window": plan.sliding_window}
    first, decoded, gained = (torch.tensor(column) for column in zip(*turns, strict=True))
    if plan.eviction == "scored":
        decoded = torch.zeros_like(decoded)  # which slot it takes, the scores decide
    positions, seen = prefilled(first, plan, heads[1]), first + decoded
    layer = make_layer(heads, gained, seen, plan.ordinals(positions, seen, first), attention, dtype, padding)
    got = rescore_tokens(
        layer.q, layer.k, layer.v, gained, seen, first, layer.old_k, layer.old_v, positions, SCALE, scorer, plan,
        **layer.attention, **layer.given(scorer),
    )  # fmt: skip
    expected = oracle(layer)
    assert_scores(got, expected, layer)
    assert_kept(got, expected, layer, plan)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(case: str, dtype: torch.dtype) -> None:
    scorer, oracle = CASES[case]
    length = torch.tensor([21, 13])
    none = torch.full((2, 2, 0), EMPTY)
    layer = make_layer((4, 2), length, torch.zeros_like(length), none, {}, dtype)
    got = score_tokens(layer.q, layer.k, layer.v, length, None, SCALE, scorer, **layer.given(scorer))
    expected = oracle(layer)
    assert_scores(got, expected, layer)
    assert_kept(got, expected, layer, SlotPlan(7, 7, 2, 0, "ring"))


@each_case
def test_row_does_not_depend_on_its_batch(case: str) -> None:
    scorer = CASES[case][0]
    length = torch.tensor([15, 4, 9])
    layer = make_layer((4, 2), length, torch.zeros_like(length), torch.full((3, 2, 0), EMPTY), {})
    given = layer.given(scorer)
    together = score_tokens(layer.q, layer.k, layer.v, length, None, SCALE, scorer, **given)
    for row, count in enumerate(length.tolist()):
        q_, k_, v_ = (tensor[row : row + 1, :, :count] for tensor in (layer.q, layer.k, layer.v))
        own = {name: tensor[row : row + 1] for name, tensor in given.items()}
        if own:
            own["unrotated"] = own["unrotated"][:, :, :count]
        alone = score_tokens(q_, k_, v_, length[row : row + 1], None, SCALE, scorer, **own)
        torch.testing.assert_close(together[row, :, :count], alone[0])


@pytest.mark.parametrize("name", scorer_names())
def test_length_stays_a_symbol_in_a_graph(name: str) -> None:
    """An export of a prompt graph runs its scorers on symbolic shapes; they must not settle on the length it has."""
    scorer, plan = make_scorer(name, {}), SlotPlan(6, 6, 2, 0, "ring")
    mode = FakeTensorMode(shape_env=ShapeEnv())
    only_length = StatelessSymbolicContext([DimDynamic.STATIC] * 2 + [DimDynamic.DUCK, DimDynamic.STATIC])
    q, k, v = (mode.from_tensor(tensor, symbolic_context=only_length) for tensor in random_qkv((4, 2), 24, DIMS))
    with mode, enable_python_dispatcher():
        _, k_cache, v_cache = random_qkv((4, 2), 1, DIMS, keys=6)
        positions, length = torch.zeros(2, 2, 6, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
        given = before_rotation(scorer, q)
        fresh = score_tokens(q, k, v, length, None, SCALE, scorer, 12, **given)
        extended = rescore_tokens(
            q, k, v, length, length, length, k_cache, v_cache, positions, SCALE, scorer, plan, 12, **given
        )
    symbol = q.shape[2].node.expr  # a number, once something has asked for its value
    assert symbol.is_symbol
    assert fresh.shape[2].node.expr == symbol
    assert symbol in extended.shape[2].node.expr.free_symbols
    assert fresh.dtype == extended.dtype == torch.float32


# H2O


@pytest.mark.parametrize("block", [1, 4, 5, 16, 17])
def test_h2o_in_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(accumulated, "BLOCK", block)
    length, seen = torch.tensor([16, 9, 0]), torch.tensor([0, 4, 30])
    plan = SlotPlan(6, 6, 2, 0, "ring", 12)
    positions = prefilled(seen, plan, 2)
    old = plan.ordinals(positions, seen, seen)
    layer = make_layer((4, 2), length, seen, old, {"sliding_window": 12, "sink_logits": True})
    got = rescore_tokens(
        layer.q, layer.k, layer.v, length, seen, seen, layer.old_k, layer.old_v, positions, SCALE, H2O(), plan,
        **layer.attention,
    )  # fmt: skip
    assert_scores(got, h2o(layer), layer)


def test_h2o_holds_one_block_of_weights_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    attention_of_block = PromptView.attention_of_block

    def watched(self: PromptView, start: int, stop: int) -> Tensor:
        paid = attention_of_block(self, start, stop)
        shapes.append(tuple(paid.shape))
        return paid

    monkeypatch.setattr(accumulated, "BLOCK", 8)
    monkeypatch.setattr(PromptView, "attention_of_block", watched)
    q, k, _ = random_qkv((4, 2), 20, DIMS, rows=1)
    score_tokens(q, k, None, torch.tensor([20]), None, SCALE, H2O())
    assert shapes == [(1, 2, 2, 8, 8), (1, 2, 2, 8, 16), (1, 2, 2, 4, 20)]


@pytest.mark.parametrize("fresh", [True, False])
def test_accumulated_attention_is_a_proper_op(fresh: bool) -> None:
    q, k, _ = random_qkv((4, 2), 5, DIMS)
    _, old_k, _ = random_qkv((4, 2), 1, DIMS, keys=3)
    length, seen = torch.tensor([5, 3]), torch.tensor([0, 9])
    old = (None, None) if fresh else (old_k, torch.tensor([[[EMPTY] * 3] * 2, [[2, 7, 8]] * 2]))
    inputs = (q, k, length, SCALE, seen, *old, 4, 1.5, torch.randn(4))
    torch.library.opcheck(accumulated.accumulated_attention, inputs)


def test_h2o_written_down() -> None:
    """All logits equal: the query at i gives 1 / (i + 1) to each of i + 1 tokens."""
    q, k = torch.zeros(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    got = score_tokens(q, k, None, torch.tensor([4]), None, SCALE, H2O())
    expected = [1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4]
    torch.testing.assert_close(got[0, 0], torch.tensor(expected))


@pytest.mark.parametrize("scorer", [H2O(), TOVA()], ids=str)
def test_attention_sums_to_the_number_of_queries(scorer: Scorer) -> None:
    q, k, _ = random_qkv((6, 2), 19, DIMS)
    length = torch.tensor([19, 7])
    mass = score_tokens(q, k, None, length, None, SCALE, scorer).sum(2)
    queries = length if scorer == H2O() else torch.ones(2)
    torch.testing.assert_close(mass, queries[:, None].expand(-1, 2).float())


# TOVA


def test_tova_keeps_the_same_tokens_in_every_head() -> None:
    q, k, _ = random_qkv((6, 3), 19, DIMS)
    length = torch.tensor([19, 12])
    scores = score_tokens(q, k, None, length, None, SCALE, TOVA())
    assert (scores == scores[:, :1]).all()
    nothing = torch.full((2, 3, 0), EMPTY)
    _, kept = select_survivors(scores, nothing, torch.zeros(2, dtype=torch.int64), length, SlotPlan(7, 7, 2, 0, "ring"))
    assert (kept == kept[:, :1]).all()


def test_tova_of_heads_that_hold_different_tokens() -> None:
    """All logits equal: each of three reached tokens is paid a third by its head; token 5 is held by both heads."""
    old = torch.tensor([[[2, 5], [5, 3]]])
    q, k, v = torch.zeros(1, 2, 1, 8), torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 6)
    view = PromptView(
        q,
        k,
        v,
        torch.tensor([1]),
        AttentionForm(SCALE),
        torch.tensor([6]),
        torch.randn(1, 2, 2, 8),
        torch.randn(1, 2, 2, 6),
        old,
    )
    torch.testing.assert_close(TOVA()(view), torch.tensor([[[1 / 6, 1 / 3, 1 / 3], [1 / 3, 1 / 6, 1 / 3]]]))


# Streaming


@pytest.mark.parametrize(("sinks", "kept"), [(0, [15, 16, 17, 18, 19]), (2, [0, 1, 17, 18, 19]), (9, [0, 1, 2, 3, 19])])
def test_streaming_keeps_sinks_and_the_newest(sinks: int, kept: list[int]) -> None:
    q, k, _ = random_qkv((4, 2), 20, DIMS, rows=1)
    length, none = torch.tensor([20]), torch.tensor([0])
    scores = score_tokens(q, k, None, length, None, SCALE, Streaming(sinks))
    _, held = select_survivors(scores, torch.full((1, 2, 0), EMPTY), none, length, SlotPlan(5, 5, 1, 0, "append"))
    assert held.tolist() == [[kept, kept]]


def test_streaming_counts_on_from_what_was_seen() -> None:
    q, k, v = random_qkv((4, 2), 2, DIMS, rows=1)
    plan = SlotPlan(3, 3, 1, 0, "ring")
    positions = torch.tensor([[[0, 8, 9]] * 2], dtype=torch.int32)
    _, k_cache, v_cache = random_qkv((4, 2), 1, DIMS, rows=1, keys=3)
    seen, length = torch.tensor([10]), torch.tensor([2])
    got = rescore_tokens(q, k, v, length, seen, seen, k_cache, v_cache, positions, SCALE, Streaming(2), plan)
    assert got[0, 0].tolist() == [14.0, 8.0, 9.0, 10.0, 11.0]


# Keys


def test_key_norm_and_key_diff_written_down() -> None:
    q, k = torch.randn(1, 1, 3, 2), torch.tensor([[[[3.0, 4.0], [0.0, 1.0], [9.0, 0.0]]]])
    norm = score_tokens(q, k, None, torch.tensor([2]), None, SCALE, KeyNorm())
    assert norm[0, 0, :2].tolist() == [-5.0, -1.0]
    diff = score_tokens(q, k, None, torch.tensor([2]), None, SCALE, KeyDiff())
    both = math.cos(math.acos(0.8) / 2)  # the mean of two unit vectors halves the angle between them
    torch.testing.assert_close(diff[0, 0, :2], torch.tensor([-both, -both]))


def test_key_diff_ranks_the_odd_one_out_first() -> None:
    k = torch.ones(1, 1, 6, 8) + 0.1 * torch.randn(1, 1, 6, 8)
    k[0, 0, 3] = -5.0
    scores = score_tokens(torch.randn(1, 1, 6, 8), k, None, torch.tensor([6]), None, SCALE, KeyDiff())
    assert int(scores[0, 0].argmax()) == 3


# Random


def test_random_keeps_a_tokens_score_when_the_prompt_is_extended() -> None:
    q, k, v = random_qkv((4, 2), 5, DIMS, rows=1)
    plan = SlotPlan(4, 4, 1, 0, "ring")
    positions = torch.tensor([[[0, 3, 7, 9]] * 2], dtype=torch.int32)
    _, k_cache, v_cache = random_qkv((4, 2), 1, DIMS, rows=1, keys=4)
    seen, length = torch.tensor([10]), torch.tensor([5])
    extended = rescore_tokens(q, k, v, length, seen, seen, k_cache, v_cache, positions, SCALE, Random(3), plan)
    q, k, _ = random_qkv((4, 2), 15, DIMS, rows=1)
    fresh = score_tokens(q, k, None, torch.tensor([15]), None, SCALE, Random(3))
    assert torch.equal(extended, fresh[:, :, [0, 3, 7, 9, *range(10, 15)]])


def test_random_is_even_and_differs_between_heads_and_seeds() -> None:
    q, k = torch.zeros(1, 4, 4096, 1), torch.zeros(1, 4, 4096, 1)
    drawn = [score_tokens(q, k, None, torch.tensor([4096]), None, SCALE, Random(seed))[0] for seed in (0, 1, 2**31)]
    sequences = torch.cat(drawn)
    assert ((sequences >= 0) & (sequences < 1)).all()
    correlation = torch.corrcoef(torch.cat((sequences, sequences.roll(1, 1))))
    assert (correlation - torch.eye(24)).abs().max() < 0.07  # 0.016 is one standard deviation
    for sequence in sequences:
        counts = torch.histc(sequence, 16, 0, 1)
        assert float(((counts - 256) ** 2 / 256).sum()) < 45  # chi squared of 15 degrees of freedom: p is 1e-4
    before = torch.get_rng_state()
    score_tokens(q, k, None, torch.tensor([4096]), None, SCALE, Random())
    assert torch.equal(torch.get_rng_state(), before)


# Value norm


def test_value_norm_follows_its_base() -> None:
    assert ValueNorm() == make_scorer("value_norm", {}) == ValueNorm("snapkv", 1)
    assert ValueNorm("snapkv").looks_at_question is SnapKV.looks_at_question is True
    assert ValueNorm("h2o").looks_at_question is H2O.looks_at_question is False
    assert ValueNorm("h2o").reads_values is True


def test_value_norm_refuses_bases_that_cannot_be_weighted() -> None:
    with pytest.raises(BudgetError, match="cannot be its own base"):
        ValueNorm("value_norm")
    with pytest.raises(BudgetError, match=r"unknown scorer 'snap'; registered are .*snapkv"):
        ValueNorm("snap")
    for signed in ("key_norm", "key_diff"):
        with pytest.raises(BudgetError, match=f"the scores of '{signed}' may be negative.*choose one of h2o, "):
            ValueNorm(signed)
    with pytest.raises(BudgetError, match="base must be the name of a registered scorer; got 3"):
        ValueNorm(3)  # type: ignore[arg-type]
    for norm in (0, 3, 1.0, True, "1", math.inf):
        with pytest.raises(BudgetError, match="norm must be 1 or 2"):
            ValueNorm(norm=norm)  # type: ignore[arg-type]


def test_value_norm_takes_every_scorer_that_is_never_negative() -> None:
    q, k, v = random_qkv((4, 2), 12, DIMS)
    length = torch.tensor([12, 5])
    for name in set(scorer_names()) - {"value_norm", "key_norm", "key_diff", "expected_attention", "reconstruction"}:
        plain = score_tokens(q, k, v, length, None, SCALE, make_scorer(name, {}))
        weighted = score_tokens(q, k, v, length, None, SCALE, ValueNorm(name))
        there = (torch.arange(12) < length[:, None])[:, None].expand_as(plain)
        assert (plain[there] >= 0).all()
        torch.testing.assert_close(weighted[there], (plain * v.abs().sum(3))[there])


def test_value_norm_of_a_users_own_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_scorers", dict(base._scorers))

    @register_scorer("first half")
    @dataclasses.dataclass(frozen=True)
    class FirstHalf:
        paper: ClassVar[str] = "http://example.org"
        looks_at_question: ClassVar[bool] = False
        reads_values: ClassVar[bool] = False
        measures_attention: ClassVar[bool] = False

        def __call__(self, prompt: PromptView) -> Tensor:
            return (prompt.ordinals < 2).float()

    with pytest.raises(BudgetError, match="or a scorer with never_negative = True"):
        ValueNorm("first half")
    FirstHalf.never_negative = True  # type: ignore[attr-defined]
    q, k, v = random_qkv((2, 1), 4, DIMS, rows=1)
    got = score_tokens(q, k, v, torch.tensor([4]), None, SCALE, ValueNorm("first half"))
    torch.testing.assert_close(got[0, 0, :2], v[0, 0, :2].abs().sum(1))
    assert got[0, 0, 2:].tolist() == [0.0, 0.0]


def test_values_that_were_not_asked_for_are_refused() -> None:
    q, k, _ = random_qkv((4, 2), 3, DIMS)
    view = PromptView(q, k, None, torch.tensor([3, 3]), AttentionForm(SCALE), torch.tensor([0, 0]))
    with pytest.raises(BudgetError, match="set reads_values = True on its class"):
        _ = view.values


# Registry and options


def test_all_are_registered_and_listed() -> None:
    kinds = {
        "expected_attention": ExpectedAttention, "h2o": H2O, "key_diff": KeyDiff, "key_norm": KeyNorm,
        "random": Random, "reconstruction": Reconstruction, "snapkv": SnapKV, "streaming": Streaming, "tova": TOVA,
        "value_norm": ValueNorm,
    }  # fmt: skip
    assert set(kinds) <= set(scorer_names())
    for name, kind in kinds.items():
        assert make_scorer(name, {}) == kind()
        assert f"\n{name} " in str(scorers.__doc__)
        assert kind.__name__ in scorers.__all__


# Expected attention


def test_expected_attention_written_down() -> None:
    """Two queries of one element: mean 2, covariance 1. R is 1/2, the scale 1, so that keys k have k + k ** 2 / 8."""
    keys = torch.tensor([0.0, 2.0, -4.0])
    unrotated = torch.tensor([9.0, 1.0, 3.0]).view(1, 1, 3, 1)  # the first token is a sink
    k, v = keys.view(1, 1, 3, 1), torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]).view(1, 1, 3, 2)
    got = score_tokens(
        torch.zeros(1, 1, 3, 1), k, v, torch.tensor([3]), None, 1.0, ExpectedAttention(sinks=1, epsilon=0.5),
        unrotated=unrotated, rotation=torch.full((1, 1, 1), 0.5),
    )  # fmt: skip
    first, second = math.exp(2 + 0.5), math.exp(-4 + 2)
    expected = [(first / (first + second) + 0.5) * 1, (second / (first + second) + 0.5) * 10]
    torch.testing.assert_close(got[0, 0, 1:], torch.tensor(expected))
    assert float(got[0, 0, 0]) > max(expected)


def test_expected_attention_without_rotation_takes_the_queries_as_they_are() -> None:
    length, none = torch.tensor([14, 9]), torch.full((2, 2, 0), EMPTY)
    layer = make_layer((4, 2), length, torch.zeros_like(length), none, {})
    given = (layer.q, layer.k, layer.v, length, None, SCALE, ExpectedAttention())
    unit = torch.eye(DIMS[0]).expand(2, -1, -1)
    plain = score_tokens(*given, unrotated=layer.unrotated)
    torch.testing.assert_close(plain, score_tokens(*given, unrotated=layer.unrotated, rotation=unit))


def test_expected_attention_is_the_limit_of_sampled_queries() -> None:
    """Its exponent is the logarithm of the mean of exp(logit) over queries drawn with these statistics."""
    q, k, v = random_qkv((1, 1), 40, DIMS, rows=1)
    scorer = ExpectedAttention(sinks=0)
    got = score_tokens(q, k, v, torch.tensor([40]), None, 0.2, scorer, unrotated=q)[0, 0]
    queries = q[0, 0].double()
    factor = torch.linalg.cholesky(torch.cov(queries.T, correction=0))
    drawn = torch.randn(200_000, DIMS[0], dtype=torch.float64) @ factor.T + queries.mean(0)
    raised = torch.exp(drawn @ k[0, 0].double().T * 0.2).mean(0)
    sampled = raised / raised.sum() * v[0, 0].double().norm(dim=1)
    torch.testing.assert_close(got.double(), sampled, rtol=0.03, atol=0.0)


def test_expected_attention_needs_to_be_given_unrotated_queries() -> None:
    q, k, v = random_qkv((4, 2), 3, DIMS)
    with pytest.raises(BudgetError, match="set needs_unrotated_queries = True on its class"):
        _ = PromptView(q, k, v, torch.tensor([3, 3]), AttentionForm(SCALE), torch.tensor([0, 0])).unrotated_queries
    assert future_positions(ExpectedAttention(7)) == 7
    assert future_positions(SnapKV()) is None

    class Careless:
        needs_unrotated_queries = True

    with pytest.raises(BudgetError, match="Careless needs unrotated queries; it must have a field future_positions"):
        future_positions(Careless())  # type: ignore[arg-type]


def test_expected_attention_is_no_attention_mass_and_no_base() -> None:
    with pytest.raises(BudgetError, match=r"'expected_attention' are not attention mass.*choose one of h2o, "):
        scorer_of(Policy(scorer="expected_attention", eviction="scored"))
    with pytest.raises(BudgetError, match=r"'expected_attention' cannot be weighted.*weights by values itself"):
        ValueNorm("expected_attention")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"future_positions": bad}, "future_positions must be a whole") for bad in (0, -1, 1.0, "4", True, None)],
        *[({"epsilon": bad}, "epsilon must be a number") for bad in (-0.1, math.inf, math.nan, "0", True, None)],
        *[({"sinks": bad}, "sinks must be a whole number of at least 0") for bad in (-1, 1.0, "4", True, None)],
    ],
    ids=repr,
)
def test_expected_attention_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        make_scorer("expected_attention", options)


@pytest.mark.parametrize("bad", [-1, 1.0, "4", True, None], ids=repr)
def test_streaming_refuses_sinks(bad: Any) -> None:
    with pytest.raises(BudgetError, match="sinks must be a whole number of at least 0"):
        Streaming(bad)


@pytest.mark.parametrize("bad", [-1, 2**32, 1.0, "4", True, None], ids=repr)
def test_random_refuses_seed(bad: Any) -> None:
    with pytest.raises(BudgetError, match="seed must be a whole number from 0 to 4294967295"):
        Random(bad)


def test_options_take_whole_numbers_of_any_kind() -> None:
    assert Streaming(np.int64(3)) == Streaming(3)  # type: ignore[arg-type]
    assert ValueNorm(norm=np.int32(2)) == ValueNorm(norm=2)  # type: ignore[arg-type]
    q, k, _ = random_qkv((2, 1), 3, DIMS)
    length = torch.tensor([3, 3])
    numpys, pythons = (score_tokens(q, k, None, length, None, SCALE, Random(seed)) for seed in (np.int64(7), 7))  # type: ignore[arg-type]
    assert torch.equal(numpys, pythons)
