"""A transformed model on a GPU: the same tokens as transformers, nothing compiled again, steps replayed from graphs."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import xkv_fx
from xkv_fx.lowering.cuda_graph import RecordedSteps, _Recorded

LAYERS, PROMPT, NEW = 2, 40, 24


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.llama(LAYERS).to("cuda")


def prompts(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, tiny_models.VOCABULARY, (rows, PROMPT), generator=generator).to("cuda")


def recorded(llm: Any) -> RecordedSteps:
    steps: RecordedSteps = llm.program.decode()
    assert isinstance(steps, RecordedSteps)
    return steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_full_budgets_are_exact(model: Any, backend: str, dtype: torch.dtype) -> None:
    cast = model if dtype == torch.float32 else tiny_models.llama(LAYERS).to("cuda", dtype)
    budgets = xkv_fx.Budgets.full(LAYERS, PROMPT + NEW)
    llm = xkv_fx.transform(cast, budgets, batch_size=2, backend=backend)
    ids = prompts(2)
    if dtype == torch.float32:
        expected = cast.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(llm.generate(ids, max_new_tokens=NEW, do_sample=False), expected)
    else:
        session = llm.new_session()
        tested = llm(ids, past_key_values=session, logits_to_keep=1).logits
        torch.testing.assert_close(tested, cast(ids).logits[:, -1:], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("eviction", ["ring", "scored"])
def test_evicting_steps_are_those_of_the_eager_graph(model: Any, eviction: str) -> None:
    budgets = xkv_fx.Budgets((20, 33), policy=xkv_fx.Policy(eviction=eviction))
    ids = prompts(2)
    outs = []
    for backend in ("eager", "inductor"):
        llm = xkv_fx.transform(model, budgets, batch_size=2, backend=backend)
        outs.append(llm.generate(ids, max_new_tokens=NEW, do_sample=False))
        assert ("2 layers by Triton kernel" in llm.describe()) == (backend == "inductor")
    assert torch.equal(*outs)


def test_graphs_are_recorded_once_a_session(model: Any) -> None:
    """Nothing is compiled again, sessions do not mix, and what a step returned stays as it was."""
    budgets = xkv_fx.Budgets.full(LAYERS, PROMPT + NEW)
    llm = xkv_fx.transform(model, budgets, batch_size=1, backend="inductor")
    plain = xkv_fx.transform(model, budgets, batch_size=1, backend="eager")
    ids = prompts(2)
    pairs = [(llm.new_session(), plain.new_session(), row[None]) for row in ids]
    for mine, oracle, row in pairs:
        llm(row, past_key_values=mine, logits_to_keep=1)
        plain(row, past_key_values=oracle, logits_to_keep=1)
    compiled = {part: dict(counter) for part, counter in counters.items()}
    kept, places = [], [[t.data_ptr() for t in mine.session.state.tensors] for mine, _, _ in pairs]
    for step in range(6):
        token = torch.full((1, 1), 3 + step, device="cuda")
        for mine, oracle, _ in pairs:
            tested = llm(token, past_key_values=mine, decoding=True).logits
            expected = plain(token, past_key_values=oracle, decoding=True).logits
            kept.append((tested, expected))
    for tested, expected in kept:
        torch.testing.assert_close(tested, expected, rtol=1e-4, atol=1e-4)
    assert {part: dict(counter) for part, counter in counters.items()} == compiled
    assert places == [[t.data_ptr() for t in mine.session.state.tensors] for mine, _, _ in pairs]
    graphs = [recorded(llm)._recorded[mine.session.state.tensors[0]] for mine, _, _ in pairs]
    assert all(isinstance(graph, _Recorded) for graph in graphs)
    del pairs, mine, oracle
    gc.collect()
    assert len(recorded(llm)._recorded) == 0


def test_a_replayed_step_allocates_nothing_of_a_caches_size(model: Any) -> None:
    budgets = xkv_fx.Budgets.full(LAYERS, 4000)
    wide = tiny_models.llama(LAYERS, max_position_embeddings=8192).to("cuda")
    llm = xkv_fx.transform(wide, budgets, batch_size=1, backend="inductor")
    session = llm.new_session()
    llm(prompts(1), past_key_values=session, logits_to_keep=1)
    token = torch.full((1, 1), 3, device="cuda")
    for _ in range(3):
        llm(token, past_key_values=session, decoding=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    llm(token, past_key_values=session, decoding=True)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < llm.kv_bytes / 2 / LAYERS
