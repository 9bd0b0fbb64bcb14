"""Other papers' allocators against plain statements of what their papers say."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from ready_models import captured, model, remember_captures
from tiny_models import random_ids

import xkv_fx
from xkv_fx.errors import BudgetError
from xkv_fx.planning.data.profile_data import Profile
from xkv_fx.planning.solve.allocators import allocator
from xkv_fx.planning.solve.limits import make_limits
from xkv_fx.planning.solve.peer_allocators import PYRAMID_BETA, SQUEEZE_SHARE, clusters, proportional

Array = NDArray[Any]


def curves_of(layers: int, context: int, seed: int = 0) -> Array:
    steps = np.random.default_rng(seed).random((layers, context)) ** 3
    curves = np.concatenate((np.zeros((layers, 1)), steps.cumsum(1)), 1)
    return np.asarray(curves / curves[:, -1:])


def test_pyramid_falls_linearly_from_nearly_twice_the_mean_to_its_twentieth() -> None:
    plan = allocator("pyramid")(curves_of(5, 4000), 5 * 1000)
    assert plan[-1] == 1000 / PYRAMID_BETA
    assert plan[0] == 2 * 1000 - plan[-1]
    assert len(set(np.diff(plan).tolist())) <= 2, "steps are equal up to rounding"


@examples(50)
@given(st.integers(1, 5), st.integers(1, 25), st.integers(0, 3), st.data())
def test_maxmin_raises_the_layer_that_keeps_least(layers: int, context: int, seed: int, data: Any) -> None:
    curves = curves_of(layers, context, seed)
    caps = np.array(data.draw(st.lists(st.integers(1, context), min_size=layers, max_size=layers)))
    total = data.draw(st.integers(layers, int(caps.sum())))
    plan = allocator("maxmin")(curves, total, caps=caps)
    by_hand = np.ones(layers, dtype=int)
    while by_hand.sum() < total:
        kept = [curves[i, c] if c < caps[i] else np.inf for i, c in enumerate(by_hand)]
        by_hand[int(np.argmin(kept))] += 1

    def worst(capacities: Array) -> float:
        return min(float(curves[i, c]) for i, c in enumerate(capacities) if c < caps[i] or (capacities == caps).all())

    assert plan.sum() == total
    assert worst(plan) == pytest.approx(worst(by_hand))


@examples(60)
@given(st.integers(1, 6), st.sampled_from([1, 4, 16]), st.integers(0, 5), st.data())
def test_proportional_keeps_weights_limits_and_total(layers: int, block: int, seed: int, data: Any) -> None:
    context = 64
    weights = np.random.default_rng(seed).random(layers)
    total = data.draw(st.integers(layers, layers * context))
    limits = make_limits(layers, context, 1, None, block).for_total(total)
    plan = proportional(weights, total, limits)
    assert plan.sum() == total
    assert (plan >= limits.floors).all()
    assert (plan <= limits.caps).all()
    free = (plan > limits.lows + limits.multiple) & (plan < context - limits.multiple)
    per_weight = plan[free] / weights[free]
    slack = 2 * limits.multiple / weights[free]
    assert all(
        abs(a - b) <= slack_a + slack_b
        for (a, slack_a), (b, slack_b) in itertools.combinations(zip(per_weight, slack, strict=True), 2)
    )


@examples(40)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=7), st.integers(1, 3))
def test_clusters_are_the_best_split(values: list[float], count: int) -> None:
    x = np.array(values)

    def cost(labels: Any) -> float:
        return sum(float(((x[labels == g] - x[labels == g].mean()) ** 2).sum()) for g in set(np.asarray(labels)))

    found = clusters(x, count)
    every = (np.array(labels) for labels in itertools.product(range(count), repeat=len(x)))
    assert cost(found) <= min(map(cost, every)) + 1e-9
    assert all(a <= b for a, b in itertools.pairwise(found[np.argsort(x, kind="stable")]))


def with_means(**means: tuple[float, ...]) -> Profile:
    specs = captured("llama", 2).layers * 2
    return Profile((curves_of(4, 100).astype(np.float32),), xkv_fx.Policy(), specs, "some model", means)


def test_squeeze_cuts_the_layers_that_change_the_hidden_state_least() -> None:
    budgets = xkv_fx.solve(
        with_means(similarity=(0.2, 0.5, 0.9, 0.91)), total_tokens=200, allocator="squeeze", multiple=1
    )
    assert all(abs(capacity - 50 * SQUEEZE_SHARE) < 1 for capacity in budgets.capacities[2:])
    assert all(abs(capacity - 50 * (2 - SQUEEZE_SHARE)) < 1 for capacity in budgets.capacities[:2])
    assert budgets.total_tokens == 200


def test_entropy_shares_by_preference() -> None:
    budgets = xkv_fx.solve(
        with_means(preference=(1.0, 2.0, 3.0, 4.0)), total_tokens=100, allocator="entropy", multiple=1
    )
    assert budgets.capacities == (10, 20, 30, 40)


@pytest.mark.parametrize("name", ["entropy", "squeeze"])
def test_what_was_not_measured_is_asked_for(name: str) -> None:
    with pytest.raises(BudgetError, match="was not measured here"):
        xkv_fx.solve(with_means(), fraction=0.5, allocator=name)


def test_statistics_are_measured_and_saved(tmp_path: Any) -> None:
    prompts = [random_ids(1, length, seed=length)[0] for length in (40, 50)]
    with pytest.MonkeyPatch.context() as patch:
        remember_captures(patch)
        profile = xkv_fx.profile(model(), prompts, statistics=("preference", "similarity"))
        plain = xkv_fx.profile(model(), prompts)
    assert all((a == b).all() for a, b in zip(profile.curves, plain.curves, strict=True)), "scores stay the same"
    source = model()
    cosines, preferences = [], []
    before = source.config._attn_implementation
    source.set_attn_implementation("eager")
    try:
        for ids in prompts:
            with torch.no_grad():
                found = source(ids[None], output_attentions=True, output_hidden_states=True, use_cache=False)
            paid = [weights[0, :, -32:] for weights in found.attentions]
            preferences.append([_preference(heads) for heads in paid])
            cosines.append([_cosine(source, index, state) for index, state in enumerate(found.hidden_states[:-1])])
    finally:
        source.set_attn_implementation(before)
    np.testing.assert_allclose(profile.layer_means["preference"], np.mean(preferences, 0), rtol=1e-4)
    np.testing.assert_allclose(profile.layer_means["similarity"], np.mean(cosines, 0), atol=1e-4)
    profile.save(tmp_path / "profile.safetensors")
    assert Profile.load(tmp_path / "profile.safetensors").layer_means == profile.layer_means


def _preference(heads: Any) -> float:
    """Of attention `[query_heads, newest queries, S]`: two query heads share a KV head."""
    pairs = heads.unflatten(0, (2, 2))
    spread = (-pairs * pairs.clamp(min=1e-30).log()).sum(-1).mean((1, 2))
    shift = pairs.var(2, correction=0).sum(-1).mean(1)
    return float((spread * shift).mean())


def _cosine(source: Any, index: int, state: Any) -> float:
    layer = source.model.layers[index]
    positions = torch.arange(state.shape[1])[None]
    with torch.no_grad():
        rotary = source.model.rotary_emb(state, positions)
        mask = torch.full((state.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        attended = layer.self_attn(layer.input_layernorm(state), position_embeddings=rotary, attention_mask=mask)[0]
    return float(torch.nn.functional.cosine_similarity(state, state + attended, -1).mean())
