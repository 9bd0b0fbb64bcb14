"""Engines of models whose prompts run in blocks of queries: a sliding window, a soft cap.

Logits are compared, not slots: one that has left the sliding window may hold either of several tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import ready_models
import torch
from exhaustive import exhaustive
from tiny_models import random_ids

import xkv_fx
from xkv_fx import Budgets


@exhaustive
@pytest.mark.parametrize("target", ["pt2", "aoti"])
@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_a_sliding_window_and_a_soft_cap(family: str, target: str, tmp_path: Path) -> None:
    llm = ready_models.transformed(Budgets((6, 16)), family=family)
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True}):  # compiles faster, runs slower
        xkv_fx.export(llm, tmp_path / "engine", target=target)
    engine = xkv_fx.load(tmp_path / "engine", trust=True)
    for length in (1, 9, 300):  # the last is longer than a block
        ids = random_ids(1, length)
        expected = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert torch.equal(engine.generate(ids, 20), expected)
    ours, theirs = engine.new_session(), llm.new_session().session
    for turn in (random_ids(1, 30), random_ids(1, 270, seed=1), random_ids(1, 1, seed=2)):
        assert torch.allclose(ours.feed(turn), theirs.feed(turn), atol=1e-4)
        for token in turn[0, :3]:
            assert torch.allclose(ours.step(token.view(1, 1)), theirs.step(token.view(1, 1)), atol=1e-4)
