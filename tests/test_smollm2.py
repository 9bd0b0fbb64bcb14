"""The whole chain on a real pretrained model, SmolLM2-135M-Instruct."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ready_models
import torch
from exhaustive import EXHAUSTIVE
from torch.profiler import ProfilerActivity

import xkv_fx
from xkv_fx.evaluation.texts import documentation
from xkv_fx.hf.models import load_model

LAYERS = 30
LENGTHS = (50, 120, 400, 1000, 2000) if EXHAUSTIVE else (50, 400)
NEW = 64 if EXHAUSTIVE else 16
LONGEST = 2064  # caches much larger than anything else in a decode step


@dataclasses.dataclass(frozen=True)
class Loaded:
    model: Any
    tokenizer: Any
    text: torch.Tensor

    def prompt(self, length: int) -> torch.Tensor:
        return self.text[length : 2 * length][None]


@dataclasses.dataclass(frozen=True)
class Generated:
    sequences: torch.Tensor
    logits: torch.Tensor


@pytest.fixture(scope="module")
def smollm2() -> Loaded:
    model, tokenizer = load_model("smollm2")
    return Loaded(model, tokenizer, torch.tensor(tokenizer(documentation()[:40_000])["input_ids"]))


@pytest.fixture(scope="module", autouse=True)
def captured_once() -> Iterator[None]:
    """Thirty layers take a while: what `transform` captured serves `profile` too."""
    with pytest.MonkeyPatch.context() as patch:
        ready_models.capture_once(patch)
        yield


@pytest.fixture(scope="module")
def expected(smollm2: Loaded) -> dict[int, Generated]:
    return {length: generate(smollm2.model, smollm2.prompt(length)) for length in LENGTHS}


def generate(model: Any, ids: torch.Tensor) -> Generated:
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Generated(output.sequences, torch.stack(output.logits))


@pytest.fixture(scope="module", params=["eager", "inductor"] if EXHAUSTIVE else ["eager"])
def full(request: pytest.FixtureRequest, smollm2: Loaded) -> Any:
    return xkv_fx.transform(smollm2.model, xkv_fx.Budgets.full(LAYERS, LONGEST), backend=request.param)


@pytest.mark.parametrize("length", LENGTHS)
def test_full_budgets_generate_what_the_model_generates(
    smollm2: Loaded, expected: dict[int, Generated], full: Any, length: int
) -> None:
    got = generate(full, smollm2.prompt(length))
    assert torch.equal(got.sequences, expected[length].sequences)
    assert float((got.logits - expected[length].logits).abs().max()) < 1e-4


def test_no_cache_is_copied_and_nothing_recompiles(smollm2: Loaded, full: Any) -> None:
    session = full.new_session()
    full(smollm2.prompt(400), past_key_values=session, logits_to_keep=1)
    token = torch.tensor([[11]])
    full(token, past_key_values=session, decoding=True)
    where = [tensor.data_ptr() for tensor in session.session.state.tensors]
    compiled = dict(torch._dynamo.utils.counters["inductor"])
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(3):
            full(token, past_key_values=session, decoding=True)
    one_cache = session.session.state["k_0"].nbytes
    assert max(event.cpu_memory_usage for event in profile.events()) < one_cache // 2
    assert [tensor.data_ptr() for tensor in session.session.state.tensors] == where
    assert dict(torch._dynamo.utils.counters["inductor"]) == compiled


def test_profile_solve_transform_generate(smollm2: Loaded, tmp_path: Path) -> None:
    prompts = [smollm2.text[start : start + 256] for start in (0, 3000)]
    profile = xkv_fx.profile(smollm2.model, prompts)
    budgets = xkv_fx.solve(profile, fraction=0.384, context=256)
    assert budgets.total_tokens == int(0.384 * LAYERS * 256)
    assert budgets.provenance.expected_retention is not None
    uniform = xkv_fx.solve(profile, fraction=0.384, context=256, allocator="uniform")
    assert profile.retention(budgets.capacities, 256) >= profile.retention(uniform.capacities, 256)
    budgets.save(tmp_path / "budgets.json")

    llm = xkv_fx.transform(smollm2.model, xkv_fx.Budgets.load(tmp_path / "budgets.json"), backend="eager")
    session = llm.new_session()
    planned = budgets.kv_bytes(smollm2.model)
    assert session.kv_bytes == llm.kv_bytes == planned == budgets.total_tokens * 3 * 128 * 4
    output = llm.generate(smollm2.prompt(400), max_new_tokens=8, min_new_tokens=8, past_key_values=session)
    assert output.shape == (1, 408)
    assert session.kv_bytes == planned
