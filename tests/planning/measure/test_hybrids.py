"""Measuring hybrids: only layers that attend vary, and the states of the others go on as they do when they serve."""

from __future__ import annotations

import hybrid_models
import numpy as np
import pytest
import torch
from by_hand import default_recent, snapkv_scores, survivors
from hybrid_models import feed, step, tokens, transformed
from torch import Tensor

from xkv_fx import Budgets, Policy
from xkv_fx.planning.measure.calibrate import measure_calibration
from xkv_fx.planning.measure.profile import measure_profile
from xkv_fx.planning.measure.verify import divergence_of_plans

CONTINUATION = 5
PROMPT = 30


def served(family: str, budgets: Budgets | None, ids: Tensor) -> Tensor:
    """Log-probabilities behind each token of a continuation, when a transformed model decodes it."""
    llm = transformed(family, budgets, max_new_tokens=CONTINUATION)
    session = llm.new_session()
    feed(llm, session, ids[:, :PROMPT])
    logits = [step(llm, session, ids[:, place : place + 1]) for place in range(PROMPT, PROMPT + CONTINUATION)]
    return torch.cat(logits, 1)[0].double().log_softmax(-1)


def strayed(family: str, budgets: Budgets, ids: Tensor) -> Tensor:
    """KL(full || plan) behind each token of the continuation."""
    full, tight = served(family, None, ids), served(family, budgets, ids)
    return (full.exp() * (full - tight)).sum(-1)


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("qwen3_next", Policy()),  # attention last
        ("nemotron_h", Policy(eviction="append")),  # experts last
        ("falcon_h1", Policy(eviction="scored")),  # both in each layer
        ("jamba_last", Policy()),  # recurrent layers last, which take tokens one by one
    ],
)
def test_plans_stray_as_far_as_when_they_serve(family: str, policy: Policy) -> None:
    source = hybrid_models.captured(family)
    ids = tokens(1, PROMPT + CONTINUATION, seed=4)
    plans = [Budgets((capacity,) * len(source.layers), policy) for capacity in (7, 16)]
    measured = divergence_of_plans(source, plans, [ids], CONTINUATION)[0]
    for kl, plan in zip(measured, plans, strict=True):
        torch.testing.assert_close(torch.tensor(kl), strayed(family, plan, ids), atol=1e-5, rtol=1e-3)
    assert measured[0].mean() > measured[1].mean() > 1e-4


def test_a_layer_is_calibrated_alone() -> None:
    source, ids = hybrid_models.captured("qwen3_next"), tokens(1, PROMPT + CONTINUATION, seed=4)
    kl = measure_calibration(source, [ids], Policy(), (0.25, 0.5), CONTINUATION).kl
    for layer in range(2):
        capacities = tuple(8 if other == layer else PROMPT + CONTINUATION for other in range(2))
        expected = float(strayed("qwen3_next", Budgets(capacities), ids).mean())
        assert kl[0, layer, 0] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_curves_are_those_of_the_models_own_attention() -> None:
    ids = tokens(1, PROMPT)
    with torch.no_grad():
        reported = hybrid_models.model("qwen3_next")(ids, output_attentions=True, use_cache=False).attentions
    attentions = [weights[0] for weights in reported if weights is not None]
    profile = measure_profile(hybrid_models.captured("qwen3_next"), [ids], Policy())
    assert len(profile.curves[0]) == len(attentions) == 2
    for curve, weights in zip(profile.curves[0], attentions, strict=True):
        scores = snapkv_scores(weights, 2)
        for capacity in (4, 12, 24):
            kept = survivors(scores, capacity, default_recent(capacity))
            share = sum(float(head[places].sum()) for head, places in zip(scores, kept, strict=True)) / scores.sum()
            np.testing.assert_allclose(curve[capacity], float(share), atol=1e-5)
