"""Models under plans by KV head: each head holds what a plan by layer of its capacity holds of it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar

import hybrid_models
import numpy as np
import plain_models
import pytest
import ready_models
import torch
from batches import padded
from exhaustive import exhaustive
from ready_models import captured, model, remember_captures, transformed
from tiny_models import llama, random_ids
from torch import Tensor

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.capture.captured import CapturedModel
from xkv_fx.capture.plain_module import capture_module
from xkv_fx.errors import BudgetError, CapacityError, SessionError
from xkv_fx.evaluation.coverage.tiny import Registered, tiny_model
from xkv_fx.hf.capture import capture
from xkv_fx.hf.generation import BudgetedLM
from xkv_fx.lowering.program import compile_program
from xkv_fx.mean_keys import MeanKey
from xkv_fx.passes.tools.graph import calls
from xkv_fx.runtime.session import Session

ROOM = 12
OTHER = 17
"""The capacity of other layers, which see what the first one kept."""
CODED = ("int8", "int4")


def plan(source: CapturedModel, capacity: Any, policy: Policy, formats: Any = None) -> Budgets:
    others = len(source.layers) - 1
    return Budgets((capacity, *(OTHER,) * others), policy, formats=(formats, *(None,) * others))


def fed(source: CapturedModel, budgets: Budgets, rows: int = 2) -> Session:
    """A session that was given a ragged prompt, tokens one by one, a turn and tokens again, the same under any plan."""
    session = Session(compile_program(source, budgets, "eager", ROOM))
    first, second = random_ids(1, 30, seed=1), random_ids(1, 21, seed=2)
    ids, valid = padded([first, second], "left")
    session.feed(ids[:rows], valid=valid[:rows])
    for step in range(5):
        session.step(random_ids(2, 1, seed=step)[:rows])
    session.feed(random_ids(2, 7, seed=8)[:rows])
    for step in range(3):
        session.step(random_ids(2, 1, seed=20 + step)[:rows])
    return session


def held_by(session: Session, layer: int, head: int) -> dict[str, Tensor]:
    """All that a KV head holds, by the buffers' fields."""
    (cache,) = (cache for cache in session.program.plan.caches_of(layer) if head in cache.heads)
    place = cache.heads.index(head)
    return {field: tensor[:, place] for field, tensor in session.state.of(cache).items()}


def assert_heads_are_those_of_layers(source: CapturedModel, capacities: Any, policy: Policy, formats: Any) -> None:
    """What the first layer sees does not depend on what any layer holds."""
    session = fed(source, plan(source, capacities, policy, formats))
    planned = list(zip(capacities, formats, strict=True))
    of_layers = {one: fed(source, plan(source, one[0], policy, one[1])) for one in set(planned)}
    for head, one in enumerate(planned):
        of_layer = of_layers[one]
        expected, found = held_by(of_layer, 0, head), held_by(session, 0, head)
        assert expected.keys() == found.keys()
        for field, tensor in expected.items():
            torch.testing.assert_close(found[field], tensor, atol=2e-5, rtol=1e-4)
        positions, most = of_layer.ordinals(0)[:, head], session.ordinals(0)[:, head]
        assert torch.equal(most[:, : positions.shape[1]], positions)
        assert bool((most[:, positions.shape[1] :] == -1).all())


@pytest.mark.parametrize(
    ("eviction", "scorer", "family", "formats"),
    [
        ("scored", "h2o", "llama", (None, None)),
        ("append", "expected_attention", "llama", (None, None)),
        ("ring", "random", "llama", (CODED, None)),
        ("scored", "snapkv", "llama", (None, CODED)),
        ("ring", "snapkv", "gemma2", (None, None)),
        ("append", "snapkv", "gpt_oss", (None, None)),
        ("scored", "snapkv", "lfm2", (None, CODED)),  # a hybrid
    ],
)
def test_each_head_holds_what_a_plan_by_layer_holds_of_it(
    eviction: Any, scorer: str, family: str, formats: Any
) -> None:
    capacities = (6, 30) if family in ("gemma2", "mistral", "gpt_oss") else (12, 9)  # of a window of 8 slots
    source = hybrid_models.captured(family, 2) if family == "lfm2" else captured(family, 1, 2)
    assert_heads_are_those_of_layers(source, capacities, Policy(scorer, eviction=eviction), formats)


@functools.cache
def with_six_heads() -> CapturedModel:
    return capture(llama(1, hidden_size=96, num_attention_heads=12, num_key_value_heads=6), rows=2, check=False)


def test_heads_that_are_no_neighbours_share_a_cache() -> None:
    capacities = (10, 16, 10, 16, 16, 10)
    assert_heads_are_those_of_layers(with_six_heads(), capacities, Policy("expected_attention"), (None,) * 6)
    program = compile_program(with_six_heads(), plan(with_six_heads(), capacities, Policy()), "eager")
    assert [cache.heads for cache in program.plan.caches_of(0)] == [(0, 2, 5), (1, 3, 4)]
    decodes = calls(program.graphs.decode, torch.ops.xkv.decode_attention.default)
    assert [node.args[0].meta["val"].shape[1] for node in decodes] == [6, 6]  # type: ignore[union-attr]


def test_slopes_of_a_plain_module_are_those_of_its_heads() -> None:
    module = plain_models.decoder(plain_models.sdpa_alibi)
    source = capture_module(module, plain_models.example(), rows=2, check=False)
    heads = source.layers[0].kv_heads
    assert heads > 1
    capacities = tuple(9 + 4 * (head % 2) for head in range(heads))
    assert_heads_are_those_of_layers(source, capacities, Policy(), (None,) * heads)


FULL = Budgets(((64, 70), (70, 66)), Policy(eviction="none"))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"prefill_chunk_size": 5}],
    ids=str,
)
def test_with_room_for_all_tokens_it_is_transformers_own(options: dict[str, Any]) -> None:
    rows = 2 if options.get("prefill_chunk_size") else 4 if len(options) else 2
    llm = transformed(FULL, rows)
    ids, valid = padded([random_ids(1, 18), random_ids(1, 11, seed=1)], "left")
    results = []
    for source in (llm, model()):
        torch.manual_seed(3)
        given = {"attention_mask": valid.long(), "max_new_tokens": 12, **options}
        results.append(source.generate(ids, **given))
    assert torch.equal(*results)


def test_full_heads_refuse_what_the_smallest_cannot_hold() -> None:
    session = transformed(FULL).new_session()
    assert session.get_max_length(0) == 64
    assert session.get_max_length(1) == 66
    with pytest.raises(CapacityError, match="65 tokens do not fit into the 64 slots of layer 0, KV head 0, and full"):
        session.feed(random_ids(1, 65), None, None, False)


def test_bytes_are_those_planned_and_described() -> None:
    budgets = Budgets(((9, 20), (14, 14)), Policy(eviction="append"), formats=((CODED, None), None))
    llm = transformed(budgets, 2, max_new_tokens=ROOM)
    assert llm.kv_bytes == llm.new_session().kv_bytes == budgets.kv_bytes(llm, 2, max_new_tokens=ROOM)
    assert budgets.kv_bytes(llm, 2, max_new_tokens=ROOM) == budgets.kv_bytes(model(), 2, max_new_tokens=ROOM)
    text = llm.describe()
    assert "28 slots in 3 caches by KV head" in text
    assert "split_heads" in text
    assert "KV head 1" in text
    assert [spec.kv_heads for spec in llm.layers] == [2, 2]
    assert len(llm.new_session()) == 2


def test_equal_heads_are_the_plan_by_layer_itself() -> None:
    by_layer, by_head = Budgets((12, OTHER)), Budgets(((12, 12), (OTHER, OTHER)))
    ours, theirs = transformed(by_head, 2), transformed(by_layer, 2)
    assert ours.program.key == theirs.program.key
    for kind in ("prefill", "extend", "decode"):
        assert getattr(ours, kind).code == getattr(theirs, kind).code
    assert "by KV head" not in ours.describe()


def test_sessions_are_saved_forked_and_refused_elsewhere(tmp_path: Path) -> None:
    llm = transformed(Budgets(((9, 20), (14, 11))), 2)
    session = llm.new_session()
    ids = random_ids(2, 30)
    llm(ids, past_key_values=session)
    session.save(tmp_path / "session")
    twin, again = session.fork(), llm.new_session()
    again.load(tmp_path / "session")
    logits = [llm(ids[:, :4], past_key_values=each).logits for each in (session, twin, again)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    with pytest.raises(SessionError):
        transformed(Budgets(((20, 9), (14, 11))), 2).new_session().load(tmp_path / "session")


def test_another_plan_shares_the_captured_model() -> None:
    llm = transformed(Budgets((12, OTHER)), 1)
    other = llm.with_budgets(Budgets(((12, 5), OTHER)))
    assert other.program.graphs.captured is llm.program.graphs.captured
    assert [cache.slots.slots for cache in other.program.plan.caches] == [12, 5, OTHER]


class SeesAllHeads:
    """It does not say that heads may be scored apart."""

    paper: ClassVar[str] = ""
    looks_at_question: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    measures_attention: ClassVar[bool] = False

    def __call__(self, prompt: Any) -> Tensor:
        mean: Tensor = prompt.keys.float().sum(-1).mean(1, keepdim=True)
        return mean.expand(-1, prompt.k.shape[1], -1).contiguous()


def test_a_scorer_that_must_see_all_heads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(xkv_fx.runtime.scorers.base._scorers, "all_heads", SeesAllHeads)
    policy = Policy("all_heads")
    compile_program(captured("llama", 2, 2), Budgets(((9, 9), 8), policy), "eager")
    with pytest.raises(BudgetError, match="SeesAllHeads does not say that it scores each KV head by itself"):
        compile_program(captured("llama", 2, 2), Budgets(((9, 5), 8), policy), "eager")


def test_a_wrong_number_of_heads_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_captures(monkeypatch)
    with pytest.raises(BudgetError, match="3 capacities for the KV heads of layer 1, which has 2"):
        xkv_fx.transform(model(), Budgets((8, (8, 8, 8))), backend="eager")


BORROWERS = Registered("gemma4_text", "Gemma4ForCausalLM")
BORROWING: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}


def test_borrowed_caches_are_split_alike() -> None:
    source = tiny_model(BORROWERS, **BORROWING)
    ids = random_ids(1, 40)
    llm = xkv_fx.transform(source, Budgets.full(2, 80), backend="eager")
    heads = [spec.kv_heads for spec in llm.layers]
    assert max(heads) > 1
    full = Budgets(tuple(tuple(70 + head for head in range(count)) for count in heads), Policy(eviction="none"))
    split = llm.with_budgets(full)
    assert len(split.program.plan.caches) > 2
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(split.generate(ids, **options), source.generate(ids, **options))
    session = split.new_session()
    logits = [split(part, past_key_values=session).logits for part in ids.split(20, 1)]
    torch.testing.assert_close(torch.cat(logits, 1), source(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_compiled_model_runs_by_head() -> None:
    torch._dynamo.reset()
    budgets = Budgets(((9, 20), OTHER))
    expected = transformed(budgets).generate(random_ids(1, 30), max_new_tokens=8, do_sample=False)
    source = llama(2)
    source.set_attn_implementation("xkv")
    source.compile(backend="xkv", options={"budgets": budgets, "lower": "eager"})
    cache = xkv_fx.Cache(source, budgets)
    found = source.generate(random_ids(1, 30), past_key_values=cache, max_new_tokens=8, do_sample=False)
    torch._dynamo.reset()
    assert torch.equal(found, expected)
    assert cache.kv_bytes == budgets.kv_bytes(source)
    assert cache.kept_positions(0).shape == (1, 2, 20)


@exhaustive
@pytest.mark.parametrize("target", ["pt2", "aoti"])
@pytest.mark.parametrize(
    ("scorer", "formats"), [("random", None), ("snapkv", ((CODED, ("int4", "int8")), (None, CODED)))]
)
def test_engines_run_by_head(target: str, scorer: str, formats: Any, tmp_path: Path) -> None:
    policy = Policy(scorer, eviction="append")
    means = formats and tuple(MeanKey(np.random.default_rng(layer).normal(size=(2, 8))) for layer in range(2))
    budgets = Budgets(((9, 20), OTHER), policy, formats=formats, mean_keys=means)
    llm = ready_models.transformed(budgets, max_new_tokens=ROOM)
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True}):  # compiles faster, runs slower
        xkv_fx.export(llm, tmp_path / "engine", target=target)
    engine = xkv_fx.load(tmp_path / "engine", trust=True)
    ids = random_ids(1, 30)
    expected = llm.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(engine.generate(ids, 10), expected)
    assert engine.kv_bytes == llm.kv_bytes
    assert engine.budgets == budgets


@exhaustive
@pytest.mark.parametrize("eviction", ["ring", "scored"])
def test_inductor_runs_by_head(eviction: Any) -> None:
    budgets = Budgets(((9, 20), (OTHER, 6)), Policy(eviction=eviction), formats=((CODED, None), None))
    llm = transformed(budgets, 2)
    ids = random_ids(2, 30)
    expected = llm.generate(ids, max_new_tokens=10, do_sample=False)
    compiled: BudgetedLM = llm.with_budgets(budgets, backend="inductor")
    assert torch.equal(compiled.generate(ids, max_new_tokens=10, do_sample=False), expected)
