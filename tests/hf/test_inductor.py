"""Inductor: the same tokens, caches written in place, nothing of a cache's size allocated, and nothing compiled twice.

The caches here are much larger than every activation, the logits included, so that a copy of one stands out.
"""

from __future__ import annotations

import collections
import copy
import functools
from typing import Any

import pytest
import torch
from tiny_models import gemma2, llama, random_ids
from torch import Tensor
from transformers import PreTrainedModel

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.errors import BackendError
from xkv_fx.evaluation.speed.live_bytes import memory_changes
from xkv_fx.hf.cache import SessionCache
from xkv_fx.hf.generation import BudgetedLM

CAPACITIES = (2048, 1024)
PROMPT = 2500  # more than any layer holds
HALF_A_BUFFER = 2 * 1024 * 32 * 4 // 2
"""Bytes of half of the smaller layer's keys."""
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}


@functools.cache
def big_model() -> PreTrainedModel:
    return llama(2, head_dim=32, max_position_embeddings=8192)


@functools.cache
def big(backend: str) -> BudgetedLM:
    return xkv_fx.transform(big_model(), Budgets(CAPACITIES), backend=backend, check=False)


def prefilled(backend: str = "inductor") -> SessionCache:
    session = big(backend).new_session()
    big(backend)(random_ids(1, PROMPT), past_key_values=session, logits_to_keep=1)
    return session


def step(session: SessionCache, token: int) -> Tensor:
    return big("inductor")(torch.tensor([[token]]), past_key_values=session, decoding=True).logits


@pytest.mark.parametrize("length", [1, 30, PROMPT])
def test_tokens_are_those_of_the_graphs(length: int) -> None:
    ids = random_ids(1, length)
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    compiled, graphs = (big(backend).generate(ids, **options) for backend in ("inductor", "eager"))
    assert torch.equal(compiled.sequences, graphs.sequences)
    torch.testing.assert_close(torch.cat(compiled.logits), torch.cat(graphs.logits), atol=1e-4, rtol=0)


def test_with_room_for_all_tokens_they_are_the_models() -> None:
    ids = random_ids(1, 50)
    assert torch.equal(big("inductor").generate(ids, **GREEDY), big_model().generate(ids, **GREEDY))


def test_rows_with_soft_cap_and_sliding_window() -> None:
    source, budgets = gemma2(1), Budgets((5,), Policy(sinks=1))  # its one layer has a sliding window
    compiled, graphs = (
        xkv_fx.transform(source, budgets, batch_size=2, backend=backend, check=False)
        for backend in ("inductor", "eager")
    )
    ids, mask = random_ids(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[0, :13] = 0
    options = {**GREEDY, "attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    got, expected = compiled.generate(ids, **options), graphs.generate(ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_a_step_allocates_nothing_of_a_caches_size(backend: str) -> None:
    session = prefilled(backend)
    ids = torch.tensor([[5]])
    for _ in range(2):
        session.step(ids, None)
    sizes = memory_changes(lambda: [session.step(ids, None) for _ in range(3)])
    assert sizes, "the profiler saw no allocation at all"
    assert max(sizes) < HALF_A_BUFFER


def test_layers_of_the_same_capacity_share_a_mask() -> None:
    llm = xkv_fx.transform(llama(2, head_dim=32), Budgets((777, 777)), backend="inductor", check=False)
    session = llm.new_session()
    logits = session.feed(random_ids(1, 30), None, None, all_logits=False)
    ids = logits.argmax(-1)
    session.step(ids, None)
    sizes = memory_changes(lambda: session.step(ids, None))
    assert sizes.count(777 * 4) == 1


def test_the_profiler_would_see_a_copy() -> None:
    cache = prefilled().session.state["k_1"]
    assert max(memory_changes(cache.clone)) >= 2 * HALF_A_BUFFER


def test_caches_are_written_in_place() -> None:
    session = prefilled()
    tensors = session.session.state.tensors
    pointers = [tensor.data_ptr() for tensor in tensors]
    before = [tensor.clone() for tensor in tensors]
    for token in (5, 6, 7):
        step(session, token)
    assert session.session.state.tensors is tensors
    assert [tensor.data_ptr() for tensor in tensors] == pointers
    for layer, capacity in enumerate(CAPACITIES):
        for kind in "kv":
            index = session.session.program.plan.names().index(f"{kind}_{layer}")
            changed = (tensors[index] != before[index]).any(-1)[0]
            assert changed.sum(-1).tolist() == [3, 3], "three tokens took three slots of each head"
            assert changed[:, : capacity - 64].sum() == 0, "all of them in the ring"
    assert session.kv_bytes == big("inductor").kv_bytes


@pytest.mark.parametrize(("backend", "tokens"), [("inductor", 2000), ("eager", 200)])
def test_memory_stays_at_the_plan(backend: str, tokens: int) -> None:
    llm = big(backend)
    planned = llm.budgets.kv_bytes(big_model())
    session = llm.new_session()
    tensors, bytes_of_state = session.session.state.tensors, session.state_bytes
    assert session.kv_bytes == planned
    logits = session.feed(random_ids(1, PROMPT), None, None, all_logits=False)
    for _ in range(tokens):
        logits = session.step(logits.argmax(-1), None)
    assert session.tokens_seen.tolist() == [PROMPT + tokens]
    assert torch.isfinite(logits).all()
    assert session.session.state.tensors is tensors
    assert (session.kv_bytes, session.state_bytes) == (planned, bytes_of_state)


def test_nothing_is_compiled_again() -> None:
    """Neither in later steps, nor for another session, another prompt length, or after a reset."""
    session = prefilled()
    step(session, 5)
    before = counters()
    for token in range(6, 12):
        step(session, token)
    other = big("inductor").new_session()
    big("inductor").generate(random_ids(1, 33), past_key_values=other, **GREEDY)
    other.reset()
    big("inductor").generate(random_ids(1, 41), past_key_values=other, **GREEDY)
    step(session.fork(), 7)
    assert counters() == before


def counters() -> dict[str, dict[str, int]]:
    """How often dynamo, AOTAutograd and Inductor did something, by what they did."""
    counts: dict[str, collections.Counter[str]] = torch._dynamo.utils.counters
    return {part: dict(counter) for part, counter in counts.items() if counter}


def test_weights_are_not_copied() -> None:
    """By steps after a prompt: before each prompt it is checked that nobody has changed the weights."""
    model, ids = copy.deepcopy(big_model()), random_ids(1, 9)
    llm = xkv_fx.transform(model, Budgets(CAPACITIES), check=False)
    session = llm.new_session()
    llm(ids, past_key_values=session)
    before = session.fork().step(ids[:, :1], None).clone()
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head.copy_(head.roll(1, dims=0))
    after = session.step(ids[:, :1], None)
    torch.testing.assert_close(after, before.roll(1, dims=-1))
    assert not torch.allclose(after, before, atol=0.1)


def test_the_lowering_is_described() -> None:
    assert "compiled by Inductor" in big("inductor").describe()
    assert "15 of 15 linear layers by CPU kernel" in big("inductor").describe()
    assert "graph of torch kernels" in big("eager").describe().split("decode")[1]


def test_who_serves_which_call_is_kept() -> None:
    choices = big("inductor").program.lowered.choices
    assert collections.Counter((choice.op, choice.kernel) for choice in choices) == {
        ("attention", "CPU kernel"): 2,
        ("linear layer", "CPU kernel"): 15,
    }
    assert not any(choice.refusals for choice in choices)
    assert not big("eager").program.lowered.choices


def test_a_compiler_that_fails_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch._inductor, "standalone_compile", fail)
    with pytest.raises(BackendError, match=r"Inductor could not compile the decode graph \(no C\+\+ compiler\).*eager"):
        xkv_fx.transform(llama(1), Budgets((8,)), check=False)
