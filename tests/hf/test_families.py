"""Every architecture: capture finds its layers, full budgets are exact, tight ones keep to their bytes."""

from __future__ import annotations

import functools

import pytest
import torch
from graph_checks import assert_meta_is_true
from ready_models import FULL, captured, full, model, transformed
from tiny_models import FAMILIES, POSITIONS, WINDOW, Snapshot, gemma3, random_ids
from transformers import PreTrainedModel

import xkv_fx
from xkv_fx import Budgets
from xkv_fx.hf.generation import BudgetedLM
from xkv_fx.passes.tools.graph import calls

SLIDING = {
    "llama": (None, None),
    "qwen2": (None, None),
    "qwen3": (None, None),
    "mistral": (WINDOW, WINDOW),
    "gemma2": (WINDOW, None),
    "gemma3": (WINDOW, None),
    "gpt_oss": (WINDOW, None),
}


@pytest.fixture(params=SLIDING)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_capture(family: str) -> None:
    source = model(family)
    snapshot = Snapshot.of(source)
    found = captured(family, 2, 1)
    snapshot.assert_unchanged()
    assert [spec.sliding_window for spec in found.layers] == list(SLIDING[family])
    for spec in found.layers:
        assert (spec.query_heads, spec.kv_heads, spec.key_dim, spec.value_dim, spec.itemsize) == (4, 2, 8, 8, 4)
    nodes = calls(found.prompt, torch.ops.xkv.attention.default)
    assert [node.args[3] for node in nodes] == [0, 1]


@pytest.mark.parametrize("length", [2, WINDOW + 1, 50, POSITIONS])
def test_captured_graph_computes_the_models_logits(family: str, length: int) -> None:
    ids, positions = random_ids(1, length), torch.arange(length)[None]
    with torch.no_grad():
        expected = model(family)(ids, use_cache=False).logits
        logits = captured(family, 2, 1).prompt(ids, positions)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_prompt_graph_tells_the_truth_about_itself(family: str) -> None:
    ids = random_ids(1, 11)
    assert_meta_is_true(captured(family, 2, 1).prompt, ids, torch.arange(11)[None])


@pytest.mark.parametrize("length", [1, 5, 40])
def test_full_budgets_are_exact(family: str, length: int) -> None:
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ids = random_ids(1, length)
    expected = model(family).generate(ids, **options)
    got = full(family=family).generate(ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(got.logits), torch.cat(expected.logits), atol=1e-4, rtol=0)


def test_sliding_layers_allocate_no_more_than_their_window(family: str) -> None:
    session = full(family=family).new_session()
    for layer, window in enumerate(SLIDING[family]):
        assert session.kept_positions(layer).shape == (1, 2, FULL if window is None else window)
    assert session.kv_bytes == full(family=family).kv_bytes == Budgets.full(2, FULL).kv_bytes(model(family))


def test_tight_budgets_go_on_beyond_their_capacity(family: str) -> None:
    llm = transformed(Budgets((5, 12)), family=family)
    session = llm.new_session()
    sequence = llm.generate(random_ids(1, 30), max_new_tokens=20, do_sample=False, past_key_values=session)
    assert sequence.shape == (1, 50)
    assert session.tokens_seen.tolist() == [49]
    slots = [min(capacity, window or capacity) for capacity, window in zip((5, 12), SLIDING[family], strict=True)]
    assert session.kv_bytes == Budgets((5, 12)).kv_bytes(model(family)) == sum(slots) * 2 * (8 + 8) * 4
    for layer, capacity in enumerate(slots):
        kept = session.kept_positions(layer)
        assert kept.shape == (1, 2, capacity)
        assert (kept.amax(-1) == 48).all(), "the newest token is kept"


def test_every_family_is_tested() -> None:
    assert SLIDING.keys() == FAMILIES.keys()


@functools.cache
def gemma_stack() -> tuple[PreTrainedModel, BudgetedLM]:
    source = gemma3(6, layer_types=["sliding_attention"] * 5 + ["full_attention"])
    return source, xkv_fx.transform(source, Budgets.full(6, 140), backend="eager")


@pytest.mark.parametrize("length", [3 * WINDOW, 3 * WINDOW + 5, 100])
def test_five_sliding_layers_to_a_full_one(length: int) -> None:
    """Gemma 3's stack, on prompts of three sliding windows and more, chunked and in a second turn too."""
    source, llm = gemma_stack()
    assert [spec.sliding_window for spec in llm.layers] == [WINDOW] * 5 + [None]
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ids = random_ids(1, length)
    expected = source.generate(ids, **options)
    for more in ({}, {"prefill_chunk_size": 11}):
        got = llm.generate(ids, **options, **more)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(torch.cat(got.logits), torch.cat(expected.logits), atol=1e-4, rtol=0)
    session = llm.new_session()
    llm.generate(ids[:, : length // 2], past_key_values=session, max_new_tokens=1, do_sample=False)
    assert torch.equal(llm.generate(ids, past_key_values=session, **options).sequences, expected.sequences)
    assert session.kv_bytes == (5 * WINDOW + 140) * 2 * (8 + 8) * 4
