"""Profiling a model: curves of what its attention really does, on the share of the prompts that was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from by_hand import default_recent, snapkv_scores, survivors
from ready_models import model, remember_captures
from tiny_models import POSITIONS, Snapshot, random_ids
from torch import Tensor

import xkv_fx
from xkv_fx import Policy
from xkv_fx.errors import BudgetError, PromptError, UnsupportedModelError
from xkv_fx.hf.capture import layers_of_model
from xkv_fx.hf.inspect import fingerprint
from xkv_fx.planning.data.profile_data import Profile
from xkv_fx.planning.measure.profile import sample_prompts
from xkv_fx.runtime.scorers import scorer_names

PROMPTS = [random_ids(1, length, seed=length)[0] for length in (30, 7, 45, 2)]
MEASURES_ATTENTION = {"h2o", "reconstruction", "snapkv", "tova"}
POLICIES = {
    "default": Policy(),
    "others": Policy(scorer_options={"observation_window": 3, "kernel": 1}, recent=4, sinks=2),
}


@pytest.fixture(scope="module", params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]


@pytest.fixture(scope="module")
def measured(policy: Policy, plain: Profile) -> Profile:
    if policy == plain.policy:
        return plain
    with pytest.MonkeyPatch.context() as patch:
        remember_captures(patch)
        return xkv_fx.profile(model(), PROMPTS, policy=policy)


def attentions(ids: Tensor) -> tuple[Tensor, ...]:
    """Attention probabilities `[query_heads, S, S]` of each layer, from transformers' own eager attention."""
    source = model()
    before = source.config._attn_implementation
    source.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = source(ids[None], output_attentions=True, use_cache=False).attentions
    finally:
        source.set_attn_implementation(before)
    return tuple(weights[0] for weights in found)


def curve_by_hand(scores: Tensor, policy: Policy) -> list[float]:
    """For each capacity, the share of the scores' sum that belongs to the tokens that prefill keeps."""
    length, total = scores.shape[1], float(scores.sum())
    curve = [0.0]
    for capacity in range(1, length + 1):
        recent = default_recent(capacity) if policy.recent is None else min(policy.recent, capacity)
        kept = survivors(scores, capacity, recent, min(policy.sinks, capacity - recent))
        curve.append(sum(float(head[tokens].sum()) for head, tokens in zip(scores, kept, strict=True)) / total)
    return curve


def test_curves_are_those_of_the_models_own_attention(measured: Profile, policy: Policy) -> None:
    assert measured.lengths == (30, 7, 45, 2)
    for ids, curves in zip(PROMPTS, measured.curves, strict=True):
        for weights, curve in zip(attentions(ids), curves, strict=True):
            scores = snapkv_scores(weights, 2, **policy.scorer_options)  # type: ignore[arg-type]
            by_hand = np.maximum.accumulate(curve_by_hand(scores, policy))  # more slots never keep less
            np.testing.assert_allclose(curve, by_hand, atol=1e-5)


def test_profile_says_what_it_was_made_for(measured: Profile, policy: Policy) -> None:
    assert measured.policy == policy
    assert measured.layers == layers_of_model(model())
    assert measured.model == fingerprint(model())
    assert all(curves.dtype == np.float32 for curves in measured.curves)


def test_a_plan_of_it_serves_the_model_and_no_other(measured: Profile) -> None:
    budgets = xkv_fx.solve(measured, fraction=0.5)
    assert budgets.total_tokens == 45
    assert budgets.policy == measured.policy
    assert budgets.provenance.model == fingerprint(model())
    budgets.check_layers(layers_of_model(model()), fingerprint(model()))


@pytest.fixture
def _captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_captures(monkeypatch)


@pytest.fixture(scope="module")
def plain() -> Profile:
    return xkv_fx.profile(model(), PROMPTS)


@pytest.mark.parametrize(("sampling", "prompts"), [(0.25, 1), (0.3, 2), (0.5, 2), (0.75, 3), (1e-6, 1), (1, 4)])
def test_sampling_takes_the_first_share(sampling: float, prompts: int) -> None:
    assert len(sample_prompts(PROMPTS, sampling)) == prompts
    assert all(got is wanted for got, wanted in zip(sample_prompts(PROMPTS, sampling), PROMPTS, strict=False))


@pytest.mark.usefixtures("_captured_once")
def test_only_sampled_prompts_are_measured(plain: Profile) -> None:
    done: list[tuple[int, int]] = []
    broken = [*PROMPTS[:2], torch.tensor([3]), torch.zeros(POSITIONS + 1, dtype=torch.int64)]
    half = xkv_fx.profile(model(), broken, sampling=0.5, progress=lambda *count: done.append(count))
    assert half.lengths == (30, 7)
    for got, wanted in zip(half.curves, plain.curves, strict=False):
        np.testing.assert_array_equal(got, wanted)
    assert done == [(1, 2), (2, 2)]


def tokenizer(text: str) -> dict[str, list[int]]:
    """A tokenizer of letters."""
    return {"input_ids": [3 + ord(letter) % 50 for letter in text]}


@pytest.mark.usefixtures("_captured_once")
def test_prompts_come_in_every_form() -> None:
    text = "a prompt of letters"
    ids = torch.tensor(tokenizer(text)["input_ids"])
    forms: list[Any] = [text, ids, ids[None], ids.tolist(), ids.int()]
    curves = xkv_fx.profile(model(), forms, tokenizer=tokenizer).curves
    for curve in curves[1:]:
        np.testing.assert_array_equal(curve, curves[0])


def test_the_model_is_left_as_it_was() -> None:
    source = model()
    source.train()
    try:
        snapshot = Snapshot.of(source)
        xkv_fx.profile(source, PROMPTS[:1])
        snapshot.assert_unchanged()
    finally:
        source.eval()


@pytest.mark.usefixtures("_captured_once")
def test_profile_is_the_same_again(plain: Profile) -> None:
    assert xkv_fx.profile(model(), PROMPTS) == plain


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "none": ([], "prompts must be a list of at least one"),
    "a string": ("a prompt", "prompts must be a list"),
    "a tensor": (random_ids(1, 5), "prompts must be a list"),
    "a generator": ((prompt for prompt in PROMPTS), "prompts must be a list"),
    "a string without tokenizer": ([PROMPTS[0], "words"], "prompt 1 is a string; pass the model's tokenizer"),
    "empty": ([PROMPTS[0], []], "prompt 1 is empty"),
    "empty tensor": ([torch.zeros(1, 0, dtype=torch.int64)], "prompt 0 is empty"),
    "too short": ([PROMPTS[0], [3]], "prompt 1 has 1 tokens; a profile needs at least 2"),
    "too long": (
        [PROMPTS[0], [3] * (POSITIONS + 1)],
        f"prompt 1 has {POSITIONS + 1} tokens, more than the model's {POSITIONS} positions",
    ),
    "two rows": ([random_ids(2, 5)], r"prompt 0 must be one row of token ids; got the shape \[2, 5\]"),
    "fractions": ([[1.0, 2.0]], "prompt 0 must be token ids, whole numbers; got torch.float32"),
    "truth values": ([[True, False]], "prompt 0 must be token ids"),
    "nothing": ([None], "prompt 0 is neither a string nor token ids"),
    "an object": ([object()], "prompt 0 is neither a string nor token ids"),
    "words": ([["some", "words"]], "prompt 0 is neither a string nor token ids"),
    "a negative token": ([[3, -1, 4]], "prompt 0 has the token -1, but the model's tokens are 0 to 60"),
    "a token that does not exist": ([[3, 61, 4]], "prompt 0 has the token 61, but the model's tokens are 0 to 60"),
}


@pytest.mark.usefixtures("_captured_once")
@pytest.mark.parametrize("case", list(BAD_PROMPTS))
def test_bad_prompts_are_refused_by_number(case: str) -> None:
    prompts, message = BAD_PROMPTS[case]
    with pytest.raises(PromptError, match=message) as caught:
        xkv_fx.profile(model(), prompts)
    assert len(str(caught.value).splitlines()) == 1


def test_an_empty_string_is_an_empty_prompt() -> None:
    with pytest.raises(PromptError, match="prompt 0 is empty"):
        xkv_fx.profile(model(), [""], tokenizer=tokenizer)


@pytest.mark.parametrize("sampling", [0, -0.5, 1.5, float("nan"), "all", None])
def test_bad_sampling_is_refused(sampling: Any) -> None:
    with pytest.raises(BudgetError, match="sampling must be"):
        xkv_fx.profile(model(), PROMPTS, sampling=sampling)


@pytest.mark.usefixtures("_captured_once")
def test_an_unknown_scorer_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"unknown scorer 'guess'; registered are .*snapkv"):
        xkv_fx.profile(model(), PROMPTS, policy=Policy(scorer="guess"))


@pytest.mark.parametrize("policy", ["snapkv", {}, 0, Policy])
def test_a_policy_of_another_type_is_refused(policy: Any) -> None:
    with pytest.raises(BudgetError, match=f"policy must be an xkv_fx.Policy; got {type(policy).__name__}"):
        xkv_fx.profile(model(), PROMPTS[:1], policy=policy)


@pytest.mark.parametrize("scorer", sorted(set(scorer_names()) - MEASURES_ATTENTION))
def test_scores_that_are_no_attention_mass_are_refused(scorer: str) -> None:
    with pytest.raises(
        BudgetError,
        match=f"scores of '{scorer}' are not attention mass.*choose one of h2o, reconstruction, snapkv, tova",
    ):
        xkv_fx.profile(model(), PROMPTS[:1], policy=Policy(scorer))


@pytest.mark.usefixtures("_captured_once")
@pytest.mark.parametrize("scorer", sorted(MEASURES_ATTENTION))
def test_attention_mass_is_profiled_whatever_the_scorer(scorer: str) -> None:
    measured = xkv_fx.profile(model(), PROMPTS[:1], policy=Policy(scorer))
    (curves,) = measured.curves
    assert (curves[:, 0] == 0).all()
    assert (np.diff(curves, axis=1) >= 0).all()
    np.testing.assert_allclose(curves[:, -1], 1.0, atol=1e-6)


@pytest.mark.parametrize("what", [None, "a-model", torch.nn.Linear(2, 2)], ids=["None", "str", "module"])
def test_what_is_no_model_is_refused(what: Any) -> None:
    with pytest.raises(UnsupportedModelError):
        xkv_fx.profile(what, PROMPTS)
