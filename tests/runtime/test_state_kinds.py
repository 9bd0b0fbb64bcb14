"""A new kind of state is one class: everybody else iterates over what it says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from ready_models import cache_plan, captured
from tiny_models import random_ids
from torch import Tensor

from xkv_fx.engines.manifest import inputs_of
from xkv_fx.errors import FileFormatError
from xkv_fx.lowering.program import CompiledProgram, Graphs
from xkv_fx.runtime.scorers import SnapKV
from xkv_fx.runtime.session import Session
from xkv_fx.runtime.session_file import load_session, save_session
from xkv_fx.runtime.state import Buffer, Build, CachePlan, GraphKind, LayerState

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class TurnsState(LayerState):
    """Counts the tokens of each row, and how many prompts and turns brought some."""

    kind: ClassVar[str] = "turns"
    rows: int

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return tuple(Buffer(name, name, (self.rows,), torch.int64) for name in ("tokens", "turns"))

    def finish(self, build: Build, kind: GraphKind) -> None:
        held = build.held(self)
        if kind == "decode":
            build.emit(aten.add_.Tensor, held["tokens"], 1)
            return
        counted = build.inline(_first if kind == "prefill" else _further, held["tokens"], held["turns"], build.length)
        for field, value in zip(("tokens", "turns"), counted, strict=True):
            build.emit(aten.copy_.default, held[field], value)

    def problem(self, held: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> str | None:
        return None if torch.equal(held["tokens"], counts["seen"]) else "its turns are not those of its tokens"


def _first(tokens: Tensor, turns: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    return length + 0 * tokens, (length > 0).long() + 0 * turns


def _further(tokens: Tensor, turns: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    return tokens + length, turns + (length > 0).long()


@dataclasses.dataclass(frozen=True)
class PlanWithTurns(CachePlan):
    @functools.cached_property
    def states(self) -> tuple[LayerState, ...]:
        return (*self.caches, self.counters, TurnsState(self.rows))


@pytest.fixture(scope="module")
def session() -> Session:
    source = captured()
    plain = cache_plan(source, (12, 16, 12))
    plan = PlanWithTurns(plain.layers, plain.slots, plain.rows, plain.dtype, plain.device)
    return Session(CompiledProgram(Graphs(source, plan, SnapKV()), "eager"))


def conversation(session: Session) -> list[Tensor]:
    valid = torch.tensor([[True] * 7, [False] * 2 + [True] * 5])
    logits = [session.feed(random_ids(2, 7), valid=valid)]
    logits += [session.step(random_ids(2, 1, seed=seed)) for seed in (1, 2, 3)]
    logits.append(session.feed(random_ids(2, 4, seed=4), valid=torch.tensor([[True] * 4, [False] * 4])))
    return logits


def test_graphs_keep_it_and_compute_what_they_did(session: Session) -> None:
    source = captured()
    plain = Session(CompiledProgram(Graphs(source, cache_plan(source, (12, 16, 12)), SnapKV()), "eager"))
    for ours, theirs in zip(conversation(session), conversation(plain), strict=True):
        assert torch.equal(ours, theirs)
    assert session.state["tokens"].tolist() == session.counts["seen"].tolist() == list(session.seen) == [14, 8]
    assert session.state["turns"].tolist() == [2, 1]
    assert session.state.state_bytes == plain.state.state_bytes + 2 * 2 * 8
    assert session.state.kv_bytes == plain.state.kv_bytes


def test_sessions_carry_it_along(session: Session, tmp_path: Path) -> None:
    session.reset()
    conversation(session)
    twin = session.fork()
    twin.reorder(torch.tensor([1, 1]))
    assert twin.state["turns"].tolist() == [1, 1]
    session.reset([0])
    assert session.state["turns"].tolist() == [0, 1]
    save_session(session, tmp_path / "session")
    load_session(twin, tmp_path / "session")
    assert twin.state["turns"].tolist() == [0, 1]
    session.state["tokens"].add_(1)
    save_session(session, tmp_path / "session")
    with pytest.raises(FileFormatError, match="its turns are not those of its tokens"):
        load_session(twin, tmp_path / "session")


def test_engines_take_it(session: Session) -> None:
    names = [spec.name for spec in inputs_of("decode", session.program.plan)]
    assert names[-4:] == ["seen", "base", "tokens", "turns"]
