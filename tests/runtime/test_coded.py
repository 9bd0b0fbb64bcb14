"""Slots of fewer bits through any conversation: what comes out is what slots in the model's dtype give, if every token
passes through its coding when it is written, and only then."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from exhaustive import exhaustive
from ready_models import cache_plan, captured
from tiny_models import random_ids
from torch import Tensor

from xkv_fx.errors import BudgetError, SessionError
from xkv_fx.lowering.program import CompiledProgram, Graphs
from xkv_fx.mean_keys import MeanKey
from xkv_fx.policy import Eviction, Policy
from xkv_fx.runtime.quantize import Coding
from xkv_fx.runtime.scorers import Scorer, scorer_of
from xkv_fx.runtime.session import Session
from xkv_fx.runtime.session_file import load_session, save_session
from xkv_fx.runtime.state import Attention, Build, CachePlan, CodedState, KVState, Value

PAIRS: dict[str, Any] = {
    "int8": ("int8", "int8"),
    "int8/int4": ("int8", "int4"),
    "int4": ("int4", "int4"),
    "model/int4": ("model", "int4"),
    "int8/model": ("int8", "model"),
    "fp8": ("fp8", "fp8"),
    "fp8/int4": ("fp8", "int4"),
}


@dataclasses.dataclass(frozen=True)
class PassedState(KVState):
    """Slots in the model's dtype, of tokens that have passed through a coding when they were written."""

    formats: Any = ("model", "model")
    mean_key: MeanKey | None = None

    def _passed(self, build: Build, attention: Any) -> Any:
        made = {}
        for field, name, node in zip("kv", self.formats, (attention.k, attention.v), strict=True):
            size = node.meta["val"].shape[-1]
            made[field] = node
            if name != "model":
                coding = Coding.of(name, size)
                with_mean = field == "k" and self.mean_key is not None
                made[field] = build.inline(functools.partial(passed, coding) if with_mean else coding.passed, node)
        return dataclasses.replace(attention, **made)

    def _keep(self, build: Build, attention: Attention, scores: Value, fresh: bool) -> None:
        super()._keep(build, self._passed(build, attention), scores, fresh)

    def decode(self, build: Build, attention: Attention) -> Value:
        return super().decode(build, self._passed(build, attention))


def mean_key(kv_heads: int = 2, key_dim: int = 8) -> Tensor:
    """Far from 0, and other for each head and channel."""
    return 3 * torch.sin(torch.arange(kv_heads * key_dim, dtype=torch.float32)).view(kv_heads, key_dim)


def passed(coding: Coding, keys: Tensor) -> Tensor:
    mean = mean_key(keys.shape[1], keys.shape[3])[:, None]
    return coding.passed(keys - mean) + mean


@dataclasses.dataclass(frozen=True)
class PassedPlan(CachePlan):
    @functools.cached_property
    def caches(self) -> tuple[KVState, ...]:
        coded = CachePlan(*(getattr(self, field.name) for field in dataclasses.fields(CachePlan))).caches
        return tuple(
            PassedState(**{field.name: getattr(cache, field.name) for field in dataclasses.fields(PassedState)})
            if isinstance(cache, CodedState)
            else cache
            for cache in coded
        )

    @functools.cached_property
    def constants(self) -> Any:
        return dict.fromkeys(self.states, ())


def sessions(
    family: str, policy: Policy, pairs: tuple[Any, ...], backend: str = "eager", means: bool = False
) -> tuple[Session, Session]:
    """One with slots of fewer bits, and one that says what it should compute."""
    source = captured(family, 3, 2)
    capacities = (64,) * 3 if policy.eviction == "none" else (12, 17, 14)
    plain = cache_plan(source, capacities, policy, max_new_tokens=9)
    scorer: Scorer = scorer_of(policy)
    mean_keys = tuple(MeanKey(mean_key(spec.kv_heads, spec.key_dim).numpy()) for spec in plain.layers)
    given = (plain.layers, plain.slots, plain.rows, plain.dtype, plain.device, pairs)
    constants = {"mean_keys": mean_keys if means else None}
    ours, theirs = CachePlan(*given, **constants), PassedPlan(*given, **constants)
    return tuple(  # type: ignore[return-value]
        Session(CompiledProgram(Graphs(source, plan, scorer), name))
        for plan, name in ((ours, backend), (theirs, "eager"))
    )


def conversation(session: Session) -> list[Tensor]:
    """A padded prompt, some steps, a turn in which a row is silent, and more steps."""
    left = torch.tensor([[True] * 23, [False] * 6 + [True] * 17])
    logits = [session.feed(random_ids(2, 23), valid=left)]
    logits += [session.step(random_ids(2, 1, seed=seed)) for seed in range(4)]
    logits.append(session.feed(random_ids(2, 5, seed=9), valid=torch.tensor([[True] * 5, [False] * 5])))
    logits += [session.step(random_ids(2, 1, seed=seed)) for seed in range(4, 7)]
    logits.append(session.feed(random_ids(2, 8, seed=10), all_logits=True))
    return logits


def assert_same(ours: Session, theirs: Session) -> None:
    for got, expected in zip(conversation(ours), conversation(theirs), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    for layer in range(3):
        assert torch.equal(ours.ordinals(layer), theirs.ordinals(layer))


@pytest.mark.parametrize("pair", list(PAIRS))
@pytest.mark.parametrize("eviction", ["ring", "scored", "append", "none"])
def test_every_eviction(eviction: Eviction, pair: str) -> None:
    assert_same(*sessions("llama", Policy(eviction=eviction), (PAIRS[pair],) * 3))


@pytest.mark.parametrize(
    ("family", "eviction"), [("llama", "append"), ("gemma2", "scored"), ("gpt_oss", "append"), ("deepseek", "append")]
)
def test_mean_keys_change_codes_and_nothing_else(family: str, eviction: Eviction) -> None:
    """Softcaps, sink logits, windows, latents that are values too, and turns whose logits meet those of the slots."""
    pair = PAIRS["int8" if family == "deepseek" else "int8/int4"]
    assert_same(*sessions(family, Policy(eviction=eviction), (pair,) * 3, means=True))


@pytest.mark.parametrize("scorer", ["key_diff", "expected_attention", "h2o"])
def test_scorers_see_whole_keys(scorer: str) -> None:
    assert_same(*sessions("llama", Policy(scorer=scorer), (PAIRS["int8"], None, PAIRS["int4"]), means=True))


def test_graphs_share_the_constants() -> None:
    ours, _ = sessions("llama", Policy(), (PAIRS["int8"], None, PAIRS["int4"]), means=True)
    graphs = ours.program.graphs  # type: ignore[attr-defined]
    for layer in (0, 2):
        of_graphs = [getattr(graph, f"key_mean_{layer}") for graph in (graphs.prefill, graphs.extend, graphs.decode)]
        assert torch.equal(of_graphs[0], mean_key())
        assert len({tensor.data_ptr() for tensor in of_graphs}) == 1
        assert not hasattr(graphs.decode, "key_mean_1")


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mistral"])
@pytest.mark.parametrize("eviction", ["ring", "scored"])
def test_soft_caps_sink_logits_and_windows(family: str, eviction: Eviction) -> None:
    assert_same(*sessions(family, Policy(eviction=eviction), (PAIRS["int8/int4"],) * 3))


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("eviction", ["ring", "scored", "append", "none"])
def test_latents(eviction: Eviction, name: str) -> None:
    ours, theirs = sessions("deepseek", Policy(eviction=eviction), (PAIRS[name],) * 3)
    assert_same(ours, theirs)
    latent = {"int8": 24 + 4, "int4": 12 + 4, "fp8": 24 + 2}[name]  # of 16 + 8 elements in one group, stored once
    slots = sum(cache.slots.slots for cache in ours.program.plan.caches)
    assert ours.state.kv_bytes == 2 * slots * latent
    assert f"latent of 24 {name}" in ours.program.plan.caches[0].contents


@pytest.mark.parametrize("scorer", ["value_norm", "h2o", "expected_attention"])
def test_scorers_see_latents(scorer: str) -> None:
    assert_same(*sessions("deepseek", Policy(scorer=scorer), (PAIRS["int8"], None, PAIRS["fp8"])))


@pytest.mark.parametrize("scorer", ["h2o", "tova", "key_norm", "key_diff", "value_norm", "expected_attention"])
def test_every_scorer(scorer: str) -> None:
    assert_same(*sessions("llama", Policy(scorer=scorer), (PAIRS["int8"], None, PAIRS["int4"])))


@pytest.mark.parametrize("pair", ["int4", *(pytest.param(pair, marks=exhaustive) for pair in ("int8", "fp8"))])
def test_compiled(pair: str) -> None:
    """A compiler rounds in other places, which moves a code by one step now and then: much to a value of four bits."""
    pairs = (PAIRS[pair], None, PAIRS[pair])
    ours, theirs = sessions("llama", Policy(), pairs, "inductor")
    for got, expected in zip(conversation(ours), conversation(theirs), strict=True):
        scale = float(expected.abs().max())
        assert float((got - expected).abs().mean()) < 5e-3 * scale
        if pair == "int8":
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-2 * scale)
    again = sessions("llama", Policy(), pairs)[0]
    conversation(again)
    for layer, field in ((0, "k"), (0, "v"), (2, "k"), (2, "v")):
        coded, plain = (each.state.of(each.program.plan.caches[layer])[field] for each in (ours, again))
        if pair == "int8":
            assert int((coded.int() - plain.int()).abs().max()) <= 2
        assert float((coded != plain).float().mean()) < 0.05
        assert torch.equal(ours.ordinals(layer), again.ordinals(layer))


@pytest.mark.parametrize("pair", list(PAIRS))
def test_bytes(pair: str) -> None:
    ours, theirs = sessions("llama", Policy(), (PAIRS[pair],) * 3)
    sizes = {"model": 8 * 4, "int8": 8 + 4, "int4": 4 + 4, "fp8": 8 + 2}  # of a head of eight elements in one group
    slot = sum(sizes[name] for name in PAIRS[pair])
    assert ours.state.kv_bytes == ours.program.plan.kv_bytes == 2 * 2 * (12 + 17 + 14) * slot
    assert ours.state.state_bytes == theirs.state.state_bytes
    assert ours.program.key != theirs.program.plan.caches[0].kind


def test_forks_beams_refilled_rows_and_files(tmp_path: Path) -> None:
    ours, theirs = sessions("llama", Policy(eviction="scored"), (PAIRS["int8/int4"],) * 3)
    steps = [random_ids(2, 1, seed=seed) for seed in range(5)]
    after = []
    for session in (ours, theirs):
        session.feed(random_ids(2, 30))
        session.reorder(torch.tensor([1, 1]))
        twin = session.fork()
        session.step(steps[0])
        save_session(session, tmp_path / "session")
        session.reset([0])
        session.feed(random_ids(2, 9, seed=3), valid=torch.tensor([[True] * 9, [False] * 9]))
        logits = [session.step(steps[1]), twin.step(steps[2])]
        load_session(session, tmp_path / "session")
        after.append([*logits, session.step(steps[3])])
    for got, expected in zip(*after, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    save_session(ours, tmp_path / "coded")
    other, _ = sessions("llama", Policy(eviction="scored"), (PAIRS["int8"],) * 3)
    with pytest.raises(SessionError, match="of another model, other budgets"):
        load_session(other, tmp_path / "coded")


def test_a_latent_of_two_formats_is_refused() -> None:
    plain = cache_plan(captured(), (12, 12, 12))
    latents = tuple(dataclasses.replace(spec, value_dim=0) for spec in plain.layers)
    plan = CachePlan(latents, plain.slots, 1, plain.dtype, plain.device, (PAIRS["int8/int4"],) * 3)
    with pytest.raises(BudgetError, match=r"layer 0: keys and values are one latent.* not int8 and int4"):
        plan.allocate()
