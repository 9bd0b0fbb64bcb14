"""Indexers: the keys by which they pick what a query attends to belong to the slots of their layer."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import padded
from hybrid_models import feed, kept_by, step
from ready_models import FULL
from tiny_models import Snapshot, random_ids
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BudgetError, UnsupportedModelError
from xkv_fx.evaluation.coverage.tiny import registered, tiny_model
from xkv_fx.hf.cache_name import CACHE_NAME
from xkv_fx.hf.capture import capture
from xkv_fx.hf.generation import BudgetedLM
from xkv_fx.layers import LayerSpec, layer_fields, layer_specs
from xkv_fx.lowering.program import compile_program
from xkv_fx.passes.measure.cut_at_attention import cut_at_attention

ROWS, TOP_K, EXACT = 2, 6, 1e-4
SPEC = LayerSpec(query_heads=4, kv_heads=1, key_dim=16 + 8, value_dim=0, itemsize=4, index_dim=8)
_ENTRIES = {entry.model_type: entry for entry in registered()}


@functools.cache
def model(kind: str) -> PreTrainedModel:
    return tiny_model(_ENTRIES[kind], index_topk=TOP_K, mlp_layer_types=["dense", "dense"])


@functools.cache
def captured(kind: str) -> CapturedModel:
    snapshot = Snapshot.of(model(kind))
    made = capture(model(kind), rows=ROWS)
    snapshot.assert_unchanged()
    assert {part.index_topk for part in model(kind).modules() if hasattr(part, "index_topk")} == {TOP_K}
    return made


@functools.cache
def transformed(kind: str, budgets: Budgets | None = None, max_new_tokens: int = 0) -> BudgetedLM:
    """Full budgets when None."""
    own, budgets = model(kind), budgets or Budgets.full(2, FULL)
    program = compile_program(captured(kind), budgets, "eager", max_new_tokens)
    return BudgetedLM(own.config, own.generation_config, budgets, program)


def whole(kind: str, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(kind)(ids, use_cache=False).logits
    return logits


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=0)


def test_what_is_kept() -> None:
    llm = transformed("deepseek_v32", Budgets((20, 12)))
    assert llm.layers == (SPEC,) * 2
    assert llm.kv_bytes == llm.new_session().kv_bytes == Budgets((20, 12)).kv_bytes(llm.layers, batch_size=ROWS)
    assert llm.kv_bytes == ROWS * (20 + 12) * (24 + 8) * 4
    assert "latent of 24 + index of 8" in llm.describe()
    assert layer_specs(layer_fields(llm.layers)) == llm.layers


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])  # in the second, a layer uses what another picked
def test_turns_and_decoded_tokens_reach_far_more_tokens_than_are_picked(kind: str) -> None:
    llm = transformed(kind)
    session, rows = llm.new_session(), [random_ids(1, length, seed=length) for length in (40, 34)]
    expected, seen = [whole(kind, row) for row in rows], [0, 0]

    def fed(*counts: int) -> None:
        parts = [row[:, start : start + count] for row, start, count in zip(rows, seen, counts, strict=True)]
        ids, valid = padded(parts, "left", fill=7)
        logits = feed(llm, session, ids, valid)
        for row, count in enumerate(counts):
            close(logits[row][valid[row]], expected[row][0, seen[row] : seen[row] + count])
            seen[row] += count

    def decoded(count: int) -> None:
        for _ in range(count):
            ids = torch.cat([row[:, place : place + 1] for row, place in zip(rows, seen, strict=True)])
            logits = step(llm, session, ids)
            for row in range(ROWS):
                close(logits[row], expected[row][0, seen[row] : seen[row] + 1])
                seen[row] += 1

    fed(17, 3)
    decoded(3)
    fed(1, 9)
    fed(4, 0)  # a row without new tokens stays as it is
    decoded(4)
    fed(8, 11)


class Forgetting:
    """The oracle of tight budgets: transformers itself, with all but the kept tokens taken out of its cache."""

    def __init__(self, kind: str) -> None:
        self.model = model(kind)
        self.seen = 0
        self.made: list[list[Tensor]] = [[], []]

    def feed(self, ids: Tensor, kept: list[list[int]]) -> Tensor:
        """Logits of new tokens that reach the kept ones of each layer and each other."""
        cache: Any = DynamicCache(config=self.model.config)
        for layer, tokens in enumerate(kept):
            if tokens:
                keys, values, index = self.made[layer]
                cache.update(keys[:, :, tokens], values[:, :, tokens], layer)
                cache.update_indexer(index[:, tokens], layer)
        positions = torch.arange(self.seen, self.seen + ids.shape[1])[None]
        given = {CACHE_NAME: cache}
        with torch.no_grad():
            logits: Tensor = self.model(ids, position_ids=positions, use_cache=True, **given).logits
        self.seen += ids.shape[1]
        for layer, held in enumerate(cache.layers):
            new = [part[..., -ids.shape[1] :, :] for part in (held.keys, held.values, held.indexer_keys)]
            before = self.made[layer] or [part[..., :0, :] for part in new]
            self.made[layer] = [torch.cat(pair, -2) for pair in zip(before, new, strict=True)]
        return logits


@pytest.mark.parametrize("policy", [Policy(), Policy(eviction="scored"), Policy(scorer="tova", eviction="append")])
def test_what_is_picked_is_picked_among_the_kept(policy: Policy) -> None:
    llm = transformed("deepseek_v32", Budgets((14, 14), policy), 4 if policy.eviction == "append" else 0)
    session, oracle = llm.new_session(), Forgetting("deepseek_v32")
    ids = random_ids(1, 40, seed=4)

    def both(part: Tensor) -> Tensor:
        return part.expand(ROWS, -1)

    close(feed(llm, session, both(ids[:, :20])), both_rows(oracle.feed(ids[:, :20], [[], []])))
    for start, stop in ((20, 21), (21, 22), (22, 23), (23, 31), (31, 32)):
        new = range(start, stop)
        before = [heads[0] for heads in kept_by(session)]
        run = step if stop - start == 1 else feed
        logits = run(llm, session, both(ids[:, start:stop]))
        reached = before
        if run is step:  # the token takes its slot first
            reached = [[token for token in heads[0] if token not in new] for heads in kept_by(session)]
        close(logits, both_rows(oracle.feed(ids[:, start:stop], reached)))


def both_rows(logits: Tensor) -> Tensor:
    return logits.expand(ROWS, -1, -1)


def test_a_saved_session_goes_on(tmp_path: Path) -> None:
    llm = transformed("deepseek_v32", Budgets((14, 10)))
    session, ids = llm.new_session(), random_ids(ROWS, 30, seed=2)
    feed(llm, session, ids[:, :20])
    session.save(tmp_path / "session")
    again = llm.new_session()
    again.load(tmp_path / "session")
    for start, stop in ((20, 21), (21, 29)):
        run = step if stop - start == 1 else feed
        assert torch.equal(run(llm, session, ids[:, start:stop]), run(llm, again, ids[:, start:stop]))


# What is refused, by name


def test_their_layers_are_stored_in_the_models_dtype_alone() -> None:
    plan = Budgets((14, 14), formats=(None, ("int8", "int8")))
    with pytest.raises(BudgetError, match=r"keys of layer 1 as int8 .* but it keeps the keys of an indexer"):
        transformed("deepseek_v32", plan)
    with pytest.raises(BudgetError, match="keeps the keys of an indexer"):
        plan.kv_bytes((SPEC, SPEC))


def test_they_are_not_calibrated() -> None:
    with pytest.raises(UnsupportedModelError, match="layer 0 takes index_keys, index_queries, index_weights, top_k"):
        cut_at_attention(captured("deepseek_v32").graph("prompt"))


def test_an_indexer_that_picks_in_another_way() -> None:
    source = copy.deepcopy(model("deepseek_v32"))
    indexer = source.model.layers[1].self_attn.indexer
    indexer.softmax_scale = -1.0
    with pytest.raises(UnsupportedModelError, match=r"matmul.* of an indexer, is not understood"):
        capture(source, decode=False)
    indexer.index_topk = 7
    with pytest.raises(UnsupportedModelError, match=r"pick different numbers of keys, \[6, 7\]"):
        capture(source)
    del indexer.index_topk
    with pytest.raises(UnsupportedModelError, match=r"self_attn.indexer \(DeepseekV32Indexer\).* not pick them one by"):
        capture(source)


def test_the_backend_of_torch_compile_does_not_take_them() -> None:
    with pytest.raises(UnsupportedModelError, match="has indexers, whose keys the backend 'xkv' does not keep"):
        xkv_fx.Cache(model("deepseek_v32"), Budgets((14, 14)))


def test_engines_do_not_have_them(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="what an indexer picks, which engines do not do"):
        xkv_fx.export(transformed("deepseek_v32"), tmp_path / "engine", target="pt2")


def test_attention_over_picked_keys_is_for_capture() -> None:
    source = copy.deepcopy(model("deepseek_v32"))
    source.set_attn_implementation("xkv_picking")
    with pytest.raises(UnsupportedModelError, match="for capture alone"):
        source(random_ids(1, 5), use_cache=False)
    source.set_attn_implementation("xkv")
    with pytest.raises(UnsupportedModelError, match="need a mask besides"):
        source(random_ids(1, 5), use_cache=False)
