"""Scorers: the registry, their options, and SnapKV against its formula by loops."""

from __future__ import annotations

import dataclasses
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

from xkv_fx.errors import BudgetError
from xkv_fx.policy import SCORERS, Policy
from xkv_fx.runtime.scorers import (
    PromptView,
    Scorer,
    SnapKV,
    base,
    make_scorer,
    register_scorer,
    rescore_tokens,
    score_tokens,
    scorer_names,
    scorer_of,
)
from xkv_fx.runtime.slots import EMPTY, SlotPlan

SCALE = 0.35
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 1.5},
    {"sliding_window": 5},
    {"sink_logits": True},
    {"softcap": 1.5, "sliding_window": 12, "sink_logits": True},
]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_scorers", dict(base._scorers))


def with_sinks(options: dict[str, Any], query_heads: int) -> dict[str, Any]:
    return {**options, "sink_logits": torch.randn(query_heads) if options.get("sink_logits") else None}


def assert_scores(got: Tensor, expected: Tensor, ordinals: Tensor) -> None:
    """Compare candidates that are there; others may have any finite score, since they are never kept."""
    assert got.dtype == torch.float32
    assert got.isfinite().all()
    assert got.shape == expected.shape
    there = ordinals != EMPTY
    torch.testing.assert_close(got.double().where(there, 0), expected.where(there, 0), rtol=1e-5, atol=1e-6)


def arrived(length: Tensor, seen: Tensor, new: int, kv_heads: int) -> Tensor:
    ordinals = seen[:, None] + torch.arange(new)
    return ordinals.masked_fill(torch.arange(new) >= length[:, None], EMPTY)[:, None].expand(-1, kv_heads, -1)


# Registry


def test_snapkv_is_registered_with_the_papers_numbers() -> None:
    assert "snapkv" in scorer_names()
    assert list(scorer_names()) == sorted(scorer_names())
    assert scorer_of(Policy()) == SnapKV(observation_window=8, kernel=7)
    assert make_scorer("snapkv", {"kernel": 3}) == SnapKV(observation_window=8, kernel=3)
    assert scorer_of(Policy("snapkv", {"observation_window": 4})).observation_window == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", scorer_names())
def test_every_scorer_says_where_it_comes_from(name: str) -> None:
    scorer = make_scorer(name, {})
    assert isinstance(scorer, Scorer)
    assert "arXiv" in scorer.paper or "http" in scorer.paper
    assert type(scorer.looks_at_question) is type(scorer.reads_values) is type(scorer.measures_attention) is bool
    assert hash(scorer) == hash(make_scorer(name, {}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        scorer.paper = ""  # type: ignore[misc]


@pytest.mark.parametrize("name", scorer_names())
def test_every_scorer_gives_finite_scores_of_the_right_shape(name: str) -> None:
    scorer = make_scorer(name, {})
    q, k, v = random_qkv((4, 2), 9, (4, 6), rows=3)
    length, seen = torch.tensor([9, 1, 4]), torch.tensor([0, 3, 20])
    given = before_rotation(scorer, q)
    scores = score_tokens(q, k, v, length, None, SCALE, scorer, **given)
    assert (scores.shape, scores.dtype) == ((3, 2, 9), torch.float32)
    assert scores.isfinite().all()
    plan = SlotPlan(6, 6, 2, 0, "ring")
    positions = torch.arange(6, dtype=torch.int32).expand(3, 2, 6).contiguous()
    _, k_cache, v_cache = random_qkv((4, 2), 1, (4, 6), rows=3, keys=6)
    length = torch.tensor([9, 0, 4])
    scores = rescore_tokens(q, k, v, length, seen, seen, k_cache, v_cache, positions, SCALE, scorer, plan, **given)
    assert (scores.shape, scores.dtype) == ((3, 2, 15), torch.float32)
    assert scores.isfinite().all()


def test_unknown_scorer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BudgetError, match=r"unknown scorer 'snap'; registered are .*snapkv"):
        make_scorer("snap", {})
    with pytest.raises(BudgetError, match="unknown scorer 'h2'"):
        scorer_of(Policy("h2"))


def test_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BudgetError, match=r"no option 'window'; it takes kernel, observation_window"):
        make_scorer("snapkv", {"window": 8})
    with pytest.raises(BudgetError, match=r"no option 'a', 'b'"):
        make_scorer("snapkv", {"b": 1, "kernel": 3, "a": 2})
    with pytest.raises(BudgetError, match="no option 'paper'"):  # a class attribute is no option
        make_scorer("snapkv", {"paper": "mine"})


@pytest.mark.usefixtures("registry")
def test_missing_options_are_refused_by_name() -> None:
    @register_scorer("early")
    @dataclasses.dataclass(frozen=True)
    class Early:
        before: int
        by: int
        factor: float = 1.0
        paper: ClassVar[str] = "http://example.org"
        looks_at_question: ClassVar[bool] = False
        reads_values: ClassVar[bool] = False
        measures_attention: ClassVar[bool] = False

        def __call__(self, prompt: PromptView) -> Tensor:
            return (prompt.ordinals < self.before).float()

    with pytest.raises(
        BudgetError, match="the scorer 'early' has no default for 'before', 'by'; say so in the policy's"
    ):
        make_scorer("early", {})
    with pytest.raises(BudgetError, match="no default for 'by'"):
        make_scorer("early", {"before": 3})
    with pytest.raises(BudgetError, match="no option 'after'; it takes before, by, factor"):
        make_scorer("early", {"after": 3})
    assert make_scorer("early", {"before": 3, "by": 1}) == Early(3, 1)
    with pytest.raises(BudgetError, match="'early' has no default for 'before'"):
        make_scorer("value_norm", {"base": "early"})


@pytest.mark.usefixtures("registry")
def test_registering() -> None:
    @register_scorer("newest")
    @dataclasses.dataclass(frozen=True)
    class Newest:
        factor: float = 1.0
        paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
        looks_at_question: ClassVar[bool] = False
        reads_values: ClassVar[bool] = False
        measures_attention: ClassVar[bool] = False

        def __call__(self, prompt: PromptView) -> Tensor:
            return prompt.ordinals.float() * self.factor

    assert "newest" in scorer_names()
    scorer = scorer_of(Policy("newest", {"factor": 2.0}))
    assert scorer == Newest(2.0)
    q, k, _ = random_qkv((4, 2), 3)
    assert score_tokens(q, k, None, torch.tensor([3, 2]), None, SCALE, scorer)[:, 0].tolist() == [[0, 2, 4], [0, 2, -2]]
    with pytest.raises(BudgetError, match="'newest' is registered already"):
        register_scorer("newest")(Newest)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "it returned NoneType"),
        ([[0.5, 0.5]], "it returned list"),
        (torch.rand(2, 2, 4), r"it returned torch.float32 of shape \[2, 2, 4\] on cpu"),
        (torch.rand(2, 4, 3), r"it returned torch.float32 of shape \[2, 4, 3\]"),
        (torch.rand(2, 2, 3).double(), r"it returned torch.float64 of shape \[2, 2, 3\]"),
        (torch.ones(2, 2, 3, dtype=torch.int64), r"it returned torch.int64"),
        (torch.rand(2, 2, 3, device="meta"), r"it returned torch.float32 of shape \[2, 2, 3\] on meta"),
    ],
    ids=["nothing", "a list", "too long", "of query heads", "float64", "int64", "elsewhere"],
)
def test_scores_that_no_scorer_may_return(returned: Any, message: str) -> None:
    class Wrong(SnapKV):
        def __call__(self, prompt: PromptView) -> Tensor:
            return returned  # type: ignore[no-any-return]

    q, k, v = random_qkv((4, 2), 3)
    length = torch.tensor([3, 2])
    promise = r"the scorer Wrong must return torch.float32 of shape \[2, 2, {}\] on cpu for these tokens; "
    with pytest.raises(BudgetError, match=promise.format(3) + message):
        score_tokens(q, k, v, length, None, SCALE, Wrong())
    _, k_cache, v_cache = random_qkv((4, 2), 1, keys=5)
    positions, plan = torch.arange(5, dtype=torch.int32).expand(2, 2, 5), SlotPlan(5, 5, 2, 0, "ring")
    with pytest.raises(BudgetError, match=promise.format(8) + message):
        rescore_tokens(q, k, v, length, length, length, k_cache, v_cache, positions, SCALE, Wrong(), plan)


def test_taken_name_is_refused() -> None:
    with pytest.raises(BudgetError, match="'snapkv' is registered already"):
        register_scorer("snapkv")(SnapKV)
    assert isinstance(make_scorer("snapkv", {}), SnapKV)


# Options


@pytest.mark.parametrize("bad", [0, -1, 2.0, "8", True, None, float("nan")], ids=repr)
def test_snapkv_refuses_observation_window(bad: Any) -> None:
    with pytest.raises(BudgetError, match="observation_window must be a whole number of at least 1"):
        SnapKV(observation_window=bad)


@pytest.mark.parametrize("bad", [0, -1, 2, 8, 7.0, "7", True, None], ids=repr)
def test_snapkv_refuses_kernel(bad: Any) -> None:
    with pytest.raises(BudgetError, match="kernel must be an odd whole number of at least 1"):
        SnapKV(kernel=bad)


def test_snapkv_takes_whole_numbers_of_any_kind() -> None:
    assert SnapKV(np.int64(4), np.int32(3)) == SnapKV(4, 3)  # type: ignore[arg-type]


# SnapKV


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("lengths", "new"), [([1, 1], 1), ([5, 3], 5), ([8, 9], 9), ([26, 14], 26), ([0, 12], 12), ([3, 20], 30)], ids=str
)
def test_snapkv_of_a_fresh_prompt(
    heads: tuple[int, int], options: dict[str, Any], lengths: list[int], new: int
) -> None:
    q, k, _ = random_qkv(heads, new, (4, 4))
    length, options = torch.tensor(lengths), with_sinks(options, heads[0])
    got = score_tokens(q, k, None, length, None, SCALE, SnapKV(), **options)
    expected = snapkv_scores_reference(q, k, length, SCALE, **options)
    assert_scores(got, expected, arrived(length, torch.zeros_like(length), new, heads[1]))


@pytest.mark.parametrize("scorer", [SnapKV(1, 1), SnapKV(1, 7), SnapKV(3, 1), SnapKV(4, 5), SnapKV(100, 31)], ids=str)
def test_snapkv_of_other_sizes(scorer: SnapKV) -> None:
    q, k, _ = random_qkv((4, 2), 13, (4, 4))
    length = torch.tensor([13, 6])
    expected = snapkv_scores_reference(q, k, length, SCALE, **dataclasses.asdict(scorer))
    got = score_tokens(q, k, None, length, None, SCALE, scorer)
    assert_scores(got, expected, arrived(length, torch.zeros_like(length), 13, 2))


@given(
    heads=st.sampled_from(HEADS),
    options=st.sampled_from(OPTIONS),
    plan=st.sampled_from(
        [SlotPlan(11, 11, 3, 0, "ring"), SlotPlan(6, 12, 2, 0, "append"), SlotPlan(9, 9, 9, 0, "ring")]
    ),
    turns=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 6), st.integers(0, 14)), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    seed=st.integers(0, 999),
)
@examples(40)
def test_snapkv_of_old_slots_and_new_tokens(
    heads: tuple[int, int],
    options: dict[str, Any],
    plan: SlotPlan,
    turns: list[tuple[int, int, int]],
    padding: int,
    seed: int,
) -> None:
    """Each row has seen so many tokens at its last prefill, decoded so many since, and gains so many."""
    torch.manual_seed(seed)
    first, decoded, gained = (torch.tensor(column) for column in zip(*turns, strict=True))
    rows, new = len(turns), max(1, int(gained.max())) + padding
    q, k, v = random_qkv(heads, new, (4, 4), rows)
    _, k_cache, v_cache = random_qkv(heads, 1, (4, 4), rows, keys=plan.slots)
    positions = survivors(first, plan, heads[1])
    seen, options = first + decoded, with_sinks(options, heads[0])
    ordinals = plan.ordinals(positions, seen, first)
    got = rescore_tokens(
        q, k, v, gained, seen, first, k_cache, v_cache, positions, SCALE, SnapKV(4, 5), plan, **options
    )
    expected = snapkv_scores_reference(
        q, k, gained, SCALE, seen, k_cache, ordinals, observation_window=4, kernel=5, **options
    )
    assert_scores(got, expected, torch.cat((ordinals, arrived(gained, seen, new, heads[1])), 2))


def survivors(first: Tensor, plan: SlotPlan, kv_heads: int) -> Tensor:
    """Positions after a prefill of `first` tokens: different older ones in each head, the newest in order."""
    positions = torch.arange(plan.slots, dtype=torch.int32).expand(len(first), kv_heads, -1).clone()
    for row, total in enumerate(first.tolist()):
        for head in range(kv_heads):
            if total > plan.capacity:
                older = torch.randperm(total - plan.recent)[: plan.capacity - plan.recent].sort().values
                newest = torch.arange(total - plan.recent, total).roll((total - plan.capacity) % plan.recent)
                positions[row, head, : plan.capacity] = torch.cat((older, newest))
    return positions


def test_snapkv_is_the_mean_over_the_query_group() -> None:
    q, k, _ = random_qkv((6, 2), 15, (4, 4))
    length = torch.tensor([15, 11])
    apart = [
        score_tokens(q[:, head : head + 1], k[:, head // 3, None], None, length, None, SCALE, SnapKV())
        for head in range(6)
    ]
    together = score_tokens(q, k, None, length, None, SCALE, SnapKV())
    expected = torch.stack([torch.cat(apart[head * 3 : head * 3 + 3], 1).mean(1) for head in range(2)], 1)
    torch.testing.assert_close(together, expected)


def test_snapkv_written_down() -> None:
    """All logits equal: a query at i gives 1 / (i + 1) to each of i + 1 tokens; two queries, pooled over three."""
    q, k = torch.zeros(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    mass = 1 / 5 + 1 / 6
    got = score_tokens(q, k, None, torch.tensor([6]), None, SCALE, SnapKV(2, 3))
    prefix = [2 * mass / 3, mass, mass, 2 * mass / 3]  # token 4 belongs to the observation window
    torch.testing.assert_close(got[0, 0], torch.tensor([*prefix, (mass + 1 / 6) / 3, (mass + 1 / 6) / 3]))


def test_snapkv_does_not_see_padding() -> None:
    q, k, _ = random_qkv((4, 2), 20, (4, 4))
    length = torch.tensor([13, 13])
    expected = score_tokens(q[:, :, :13], k[:, :, :13], None, length, None, SCALE, SnapKV())
    q[:, :, 13:], k[:, :, 13:] = 100.0, -100.0
    got = score_tokens(q, k, None, length, None, SCALE, SnapKV())
    torch.testing.assert_close(got[:, :, :13], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_snapkv_in_other_precisions_scores_in_float32(dtype: torch.dtype) -> None:
    q, k, _ = random_qkv((4, 2), 20, (4, 4), dtype=dtype)
    length = torch.tensor([20, 20])
    got = score_tokens(q, k, None, length, None, SCALE, SnapKV())
    assert_scores(got, snapkv_scores_reference(q, k, length, SCALE), arrived(length, torch.zeros_like(length), 20, 2))


def test_extending_nothing_is_a_fresh_prompt() -> None:
    q, k, v = random_qkv((4, 2), 14, (4, 4))
    length, none = torch.tensor([14, 9]), torch.tensor([0, 0])
    plan = SlotPlan(5, 5, 2, 0, "ring")
    _, k_cache, v_cache = random_qkv((4, 2), 1, (4, 4), keys=5)
    positions = torch.arange(5, dtype=torch.int32).expand(2, 2, 5)
    fresh = score_tokens(q, k, None, length, None, SCALE, SnapKV())
    extended = rescore_tokens(q, k, v, length, none, none, k_cache, v_cache, positions, SCALE, SnapKV(), plan)
    there = torch.arange(14) < length[:, None, None]
    torch.testing.assert_close(extended[:, :, 5:].where(there, 0), fresh.where(there, 0))


@pytest.mark.parametrize("name", ["snapKV", "SnapKV", "snap_kv", "H2O", "expected-attention", "TOVA"])
def test_a_scorer_that_is_misspelt_is_refused_at_once(name: str) -> None:
    meant = {"s": "snapkv", "h": "h2o", "e": "expected_attention", "t": "tova"}[name[0].lower()]
    with pytest.raises(BudgetError, match=f"unknown scorer {name!r}; did you mean {meant!r}"):
        Policy(scorer=name)
    Policy(scorer="snapkv_of_mine")  # may be registered later


def test_the_policy_knows_the_scorers_that_come_with_the_package() -> None:
    ours = {name for name in scorer_names() if type(make_scorer(name, {})).__module__.startswith("xkv_fx.")}
    assert ours == set(SCORERS)
