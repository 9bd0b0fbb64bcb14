"""Sessions over a program that is no model: what reaches the graphs, what is refused, and that nothing breaks by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import keep
from torch import Tensor

from xkv_fx import Budgets
from xkv_fx.errors import CapacityError, PromptError, SessionError, XkvError
from xkv_fx.layers import LayerSpec
from xkv_fx.policy import EVICTIONS, Eviction, Policy
from xkv_fx.runtime.session import Session
from xkv_fx.runtime.slots import slot_plans
from xkv_fx.runtime.state import CachePlan

SPEC = LayerSpec(query_heads=2, kv_heads=1, key_dim=2, value_dim=3, itemsize=4)
VOCABULARY = 5


@dataclasses.dataclass
class Call:
    graph: str
    ids: Tensor
    position_ids: Tensor
    valid: Tensor | None


@dataclasses.dataclass
class FakeProgram:
    """Its K/V are the token ids themselves and all tokens score the same; graphs record what they are called with."""

    plan: CachePlan
    max_positions: int | None = None
    known_tokens: int = 2**31
    calls: list[Call] = dataclasses.field(default_factory=list)

    def prefill(self, all_logits: bool) -> Callable[..., Tensor]:
        return self._prompt("prefill", fresh=True, all_logits=all_logits)

    def extend(self, all_logits: bool) -> Callable[..., Tensor]:
        return self._prompt("extend", fresh=False, all_logits=all_logits)

    def decode(self) -> Callable[..., Tensor]:
        def graph(ids: Tensor, position_ids: Tensor, *state: Tensor) -> Tensor:
            self.calls.append(Call("decode", ids.clone(), position_ids.clone(), None))
            *buffers, seen, base = state
            for layer, plan in enumerate(self.plan.slots):
                slot = plan.next_slot(seen, base)
                assert int(slot.max()) < plan.slots, "a token was decoded that has no slot"
                for buffer in buffers[3 * layer : 3 * layer + 2]:
                    buffer[torch.arange(len(slot)), :, slot] = ids[:, :, None].to(buffer.dtype)
            seen += 1
            return self._logits(ids)

        return graph

    def _prompt(self, name: str, fresh: bool, all_logits: bool) -> Callable[..., Tensor]:
        def graph(ids: Tensor, position_ids: Tensor, valid: Tensor, *state: Tensor) -> Tensor:
            self.calls.append(Call(name, ids.clone(), position_ids.clone(), valid.clone()))
            *buffers, seen, base = state
            length = valid.sum(1)
            first = torch.argsort(~valid, dim=1, stable=True)
            tokens = ids.gather(1, first)[:, None, :, None].float()
            for layer, plan in enumerate(self.plan.slots):
                spec = self.plan.layers[layer]
                k, v = tokens.expand(-1, -1, -1, spec.key_dim), tokens.expand(-1, -1, -1, spec.value_dim)
                scores = torch.zeros(len(ids), 1, ids.shape[1] + (0 if fresh else plan.slots))
                numbers = (plan.capacity, plan.recent, plan.sinks, EVICTIONS.index(plan.eviction), plan.sliding_window)
                keep(k, v, scores, length, seen, base, *buffers[3 * layer : 3 * layer + 3], *numbers, fresh)
            base.copy_(length if fresh else torch.where(length > 0, seen + length, base))
            seen.copy_(length if fresh else seen + length)
            last = ids.gather(1, (valid.cumsum(1).argmax(1))[:, None])
            return self._logits(ids if all_logits else last)

        return graph

    def _logits(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((ids + 1) % VOCABULARY, VOCABULARY).float()


def new_session(
    capacities: tuple[int, ...] = (6, 4),
    eviction: Eviction = "ring",
    rows: int = 2,
    room: int = 0,
    max_positions: int | None = None,
) -> tuple[Session, FakeProgram]:
    layers = (SPEC,) * len(capacities)
    slots = slot_plans(Budgets(capacities, Policy(eviction=eviction)), layers, room)
    program = FakeProgram(CachePlan(layers, slots, rows, torch.float32, torch.device("cpu")), max_positions)
    return Session(program), program


def tokens(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def mask(*rows: str) -> Tensor:
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def some(length: int, rows: int = 2) -> Tensor:
    return torch.arange(length).expand(rows, -1) % VOCABULARY


def assert_refused(
    session: Session, program: FakeProgram, error: type[XkvError], match: str, attempt: Callable[[], Any]
) -> None:
    """Check that an attempt is refused before any graph runs, and that it leaves no trace."""
    before, calls = [tensor.clone() for tensor in session.state.tensors], len(program.calls)
    seen = session.seen
    with pytest.raises(error, match=match):
        attempt()
    assert len(program.calls) == calls
    assert session.seen == seen
    for tensor, copy in zip(session.state.tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def assert_usable(session: Session, program: FakeProgram) -> None:
    """Check that a small prompt and a step of decode go through."""
    fed = session.feed(some(2))
    assert fed.shape == (2, 1, VOCABULARY)
    assert session.step(some(1)).shape == (2, 1, VOCABULARY)
    assert [call.graph for call in program.calls[-2:]][1] == "decode"


# What reaches the graphs


def test_prompt_then_decode_then_a_turn() -> None:
    session, program = new_session()
    assert session.feed(tokens([1, 2, 3], [2, 3, 4])).argmax(-1).tolist() == [[4], [0]]
    session.step(tokens([4], [0]))
    session.step(tokens([0], [1]))
    session.feed(some(4), all_logits=True)
    session.step(some(1))
    assert [call.graph for call in program.calls] == ["prefill", "decode", "decode", "extend", "decode"]
    assert [call.position_ids[0].tolist() for call in program.calls] == [[0, 1, 2], [3], [4], [5, 6, 7, 8], [9]]
    assert all(call.position_ids.dtype == torch.int64 for call in program.calls)
    assert session.state["seen"].tolist() == [10, 10]
    assert max(session.seen) == 10


def test_all_logits() -> None:
    session, _ = new_session()
    assert session.feed(some(3), all_logits=True).shape == (2, 3, VOCABULARY)
    assert session.feed(some(4), all_logits=True).shape == (2, 4, VOCABULARY)
    assert session.feed(some(4)).shape == (2, 1, VOCABULARY)


def test_padding_counts_as_no_position() -> None:
    session, program = new_session(rows=3)
    session.feed(some(4, rows=3), valid=mask("xxxx", "..xx", "x..."))
    valid = program.calls[0].valid
    assert valid is not None
    assert torch.equal(valid, mask("xxxx", "..xx", "x..."))
    positions = program.calls[0].position_ids
    assert positions[valid].tolist() == [0, 1, 2, 3, 0, 1, 0]
    assert (positions >= 0).all()
    session.step(some(1, rows=3))
    assert program.calls[1].position_ids.tolist() == [[4], [2], [1]]
    session.feed(some(2, rows=3), valid=mask(".x", "xx", ".."))
    valid = program.calls[2].valid
    assert valid is not None
    assert program.calls[2].position_ids[valid].tolist() == [5, 3, 4]
    session.step(some(1, rows=3))
    assert program.calls[3].position_ids.tolist() == [[6], [5], [2]]
    assert session.state["seen"].tolist() == [7, 6, 3]


def test_own_positions_are_handed_on() -> None:
    session, program = new_session()
    session.feed(some(3), position_ids=tokens([5, 6, 7], [1, 2, 3]))
    session.step(some(1), position_ids=tokens([9], [8]))
    assert [call.position_ids.tolist() for call in program.calls] == [[[5, 6, 7], [1, 2, 3]], [[9], [8]]]


def test_no_mask_means_no_padding() -> None:
    session, program = new_session()
    session.feed(some(3))
    valid = program.calls[0].valid
    assert valid is not None
    assert valid.dtype == torch.bool
    assert valid.all()


def test_graphs_get_the_sessions_own_tensors() -> None:
    session, program = new_session()
    where = [tensor.data_ptr() for tensor in session.state.tensors]
    session.feed(some(9))
    for _ in range(5):
        session.step(some(1))
    session.feed(some(3))
    assert [tensor.data_ptr() for tensor in session.state.tensors] == where
    assert session.state.kv_bytes == program.plan.kv_bytes


def test_positions_handed_to_a_graph_are_not_the_counter_itself() -> None:
    """The graph counts `seen` up in place, before or after it reads the positions."""
    session, program = new_session()
    session.feed(some(3))
    handed: list[Tensor] = []
    decode = program.decode()

    def graph(ids: Tensor, position_ids: Tensor, *state: Tensor) -> Tensor:
        handed.append(position_ids)
        return decode(ids, position_ids, *state)

    program.decode = lambda: graph  # type: ignore[method-assign]
    session.step(some(1))
    session.step(some(1))
    assert [position_ids.tolist() for position_ids in handed] == [[[3], [3]], [[4], [4]]]


def test_ring_goes_on_for_ever() -> None:
    session, _ = new_session((3, 1))
    session.feed(some(5))
    for _ in range(20):
        session.step(some(1))
    session.feed(some(30))
    assert max(session.seen) == 55


# What is refused


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (torch.zeros(3, dtype=torch.int64), r"ids must be int64 of shape \[rows, S\]"),
        (torch.zeros(2, 3, 1, dtype=torch.int64), r"ids must be int64 of shape \[rows, S\]"),
        (torch.zeros(2, 3, dtype=torch.int32), "ids must be int64"),
        (torch.zeros(2, 3), "ids must be int64"),
        (torch.zeros(1, 3, dtype=torch.int64), "got 1 rows.*batch_size=2.*batch_size=1"),
        (torch.zeros(4, 3, dtype=torch.int64), "got 4 rows.*batch_size=2.*batch_size=4"),
        (torch.zeros(2, 0, dtype=torch.int64), "the prompt is empty"),
    ],
    ids=["one-dim", "three-dims", "int32", "float", "too-few-rows", "too-many-rows", "empty"],
)
def test_bad_ids(ids: Tensor, match: str, started: bool) -> None:
    session, program = new_session()
    if started:
        session.feed(some(3))
    assert_refused(session, program, PromptError, match, lambda: session.feed(ids))
    assert_refused(session, program, PromptError, match, lambda: session.step(ids))
    assert_usable(session, program)


def test_decode_of_more_than_a_token() -> None:
    session, program = new_session()
    session.feed(some(3))
    assert_refused(session, program, PromptError, "one token a row, not 2", lambda: session.step(some(2)))
    assert_usable(session, program)


@pytest.mark.parametrize(
    "valid",
    [mask("xxx"), mask("xx", "xx"), mask("xxx", "xxx").long(), mask("xxx", "xxx").float(), mask("xxx", "xxx")[None]],
    ids=["one-row", "too-short", "int64", "float", "three-dims"],
)
def test_bad_mask(valid: Tensor) -> None:
    session, program = new_session()
    assert_refused(
        session,
        program,
        PromptError,
        r"valid must be bool of the ids' shape \[2, 3\]",
        lambda: session.feed(some(3), valid=valid),
    )
    assert_usable(session, program)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("row", ["x.x.", "x..x", ".x.x", "xx.x", "x.xx"])
def test_holes_in_the_mask(row: str, started: bool) -> None:
    session, program = new_session()
    if started:
        session.feed(some(3))
    for valid in (mask("xxxx", row), mask(row, "xxxx")):
        assert_refused(
            session, program, PromptError, "has holes", lambda valid=valid: session.feed(some(4), valid=valid)
        )
    assert_usable(session, program)


@pytest.mark.parametrize("row", ["xxxx", "...x", "x...", ".xx.", "..xx", "xxx."])
def test_padding_before_and_after_is_taken(row: str) -> None:
    session, _ = new_session()
    session.feed(some(4), valid=mask("xxxx", row))
    assert session.state["seen"].tolist() == [4, row.count("x")]


def test_a_row_may_be_silent_at_first_and_later() -> None:
    session, program = new_session()
    session.feed(some(3), valid=mask("...", "..."))
    assert session.state["seen"].tolist() == [0, 0]
    session.feed(some(3), valid=mask("xxx", "..."))
    session.feed(some(4), valid=mask("...x", "..xx"))
    session.feed(some(2), valid=mask("..", "xx"))
    assert [call.graph for call in program.calls] == ["prefill", "prefill", "extend", "extend"]
    assert session.state["seen"].tolist() == session.state["base"].tolist() == [4, 4]
    assert session.seen == (4, 4)
    assert program.calls[2].position_ids[1, 2:].tolist() == [0, 1]
    assert program.calls[3].position_ids[1].tolist() == [2, 3]
    assert session.ordinals(0)[:, 0].tolist() == [[0, 1, 2, 3, -1, -1]] * 2
    assert session.state["k_0"][:, 0, :4, 0].tolist() == [[0, 1, 2, 3], [2, 3, 0, 1]]


@pytest.mark.parametrize(
    "position_ids", [some(2), some(3)[:1], some(3).float(), some(3)[None]], ids=["short", "row", "float", "dims"]
)
def test_bad_positions(position_ids: Tensor) -> None:
    session, program = new_session()
    assert_refused(session, program, PromptError, "position", lambda: session.feed(some(3), position_ids=position_ids))
    assert_usable(session, program)
    assert_refused(session, program, PromptError, "position", lambda: session.step(some(1), position_ids=position_ids))


def test_more_tokens_than_positions() -> None:
    session, program = new_session(max_positions=6)
    assert_refused(session, program, PromptError, "7 tokens are more than the model's 6", lambda: session.feed(some(7)))
    assert_usable(session, program)
    assert_refused(session, program, PromptError, "7 tokens are more than the model's 6", lambda: session.feed(some(4)))
    session.feed(some(2))
    session.step(some(1))
    assert_refused(session, program, PromptError, "7 tokens are more than the model's 6", lambda: session.step(some(1)))
    session.reset()
    session.feed(some(6))


def test_full_budgets_overflow() -> None:
    session, program = new_session((9, 5), "none")
    too_long = "do not fit into the 5 slots of layer 1"
    assert_refused(session, program, CapacityError, f"6 tokens {too_long}", lambda: session.feed(some(6)))
    assert_usable(session, program)
    assert_refused(session, program, CapacityError, f"6 tokens {too_long}", lambda: session.feed(some(3)))
    session.step(some(1))
    session.step(some(1))
    assert_refused(session, program, CapacityError, f"6 tokens {too_long}", lambda: session.step(some(1)))
    session.reset()
    session.feed(some(5))


def test_append_room_is_used_up() -> None:
    session, program = new_session((8, 3), "append", room=2)
    used_up = r"room for 2 appended tokens that was set aside is used up"
    session.feed(some(5))
    session.step(some(1))
    session.step(some(1))
    assert_refused(session, program, CapacityError, used_up, lambda: session.step(some(1)))
    session.feed(some(1))  # survivors are chosen again, which frees the room
    session.step(some(1))
    session.step(some(1))
    assert_refused(session, program, CapacityError, used_up, lambda: session.step(some(1)))
    session.reset()
    assert_usable(session, program)


def test_append_uses_free_slots_before_its_room() -> None:
    session, program = new_session((6,), "append", room=2)
    session.feed(some(3))
    for _ in range(5):
        session.step(some(1))
    assert_refused(session, program, CapacityError, "used up", lambda: session.step(some(1)))


def test_append_in_a_sliding_window_has_no_end() -> None:
    """Other layers' room still has one."""
    windowed = dataclasses.replace(SPEC, sliding_window=5)
    for layers, steps in (((windowed,), 40), ((windowed, SPEC), 4)):
        slots = slot_plans(Budgets((3,) * len(layers), Policy(eviction="append")), layers, 4)
        session = Session(FakeProgram(CachePlan(layers, slots, 1, torch.float32, torch.device("cpu"))))
        session.feed(some(9, rows=1))
        for _ in range(steps):
            session.step(some(1, rows=1))
        held = sorted(session.ordinals(0)[0, 0].tolist())
        assert held[-4:] == list(range(9 + steps - 4, 9 + steps))
    with pytest.raises(CapacityError, match="room for 4 appended tokens that was set aside is used up"):
        session.step(some(1, rows=1))


def test_append_room_of_a_row_that_was_silent() -> None:
    """A turn frees the room of the rows that take part in it; one that was silent has used its own up still."""
    session, program = new_session((3,), "append", room=2)
    session.feed(some(3))
    session.step(some(1))
    session.step(some(1))
    session.feed(some(2), valid=mask("xx", ".."))
    assert_refused(session, program, CapacityError, "used up", lambda: session.step(some(1)))


def test_rows_of_ragged_turns_are_counted_apart() -> None:
    """Turns that are long for different rows in turn fill no row's slots."""
    session, _ = new_session((6,), "none", max_positions=6)
    session.feed(some(5), valid=mask("xxxxx", "....x"))
    session.feed(some(5), valid=mask("....x", "xxxxx"))
    assert session.state["seen"].tolist() == [6, 6]
    assert max(session.seen) == 6


def test_another_programs_session() -> None:
    session, program = new_session()
    _, other = new_session()
    session.check_owner(program)
    with pytest.raises(SessionError, match="another transformed model"):
        session.check_owner(other)


# Forgetting and forking


def test_reset() -> None:
    session, program = new_session()
    where = [tensor.data_ptr() for tensor in session.state.tensors]
    session.feed(some(9))
    session.step(some(1))
    session.reset()
    assert not any(session.seen)
    assert session.state["seen"].tolist() == [0, 0]
    assert [tensor.data_ptr() for tensor in session.state.tensors] == where
    session.feed(some(3))
    assert program.calls[-1].graph == "prefill"
    assert program.calls[-1].position_ids.tolist() == [[0, 1, 2]] * 2
    fresh, _ = new_session()
    fresh.feed(some(3))
    for layer in range(2):
        assert torch.equal(session.ordinals(layer), fresh.ordinals(layer))


def test_sessions_are_independent() -> None:
    first, program = new_session()
    second = Session(program)
    first.feed(some(9))
    second.feed(some(2))
    first.step(some(1))
    assert first.state["seen"].tolist() == [10, 10]
    assert second.state["seen"].tolist() == [2, 2]
    pointers = [
        {tensor.untyped_storage().data_ptr() for tensor in session.state.tensors} for session in (first, second)
    ]
    assert not pointers[0] & pointers[1]


def test_fork() -> None:
    session, program = new_session(eviction="append", room=3)
    session.feed(some(7))
    session.step(some(1))
    twin = session.fork()
    assert type(twin) is Session
    twin.check_owner(program)
    before = [tensor.clone() for tensor in session.state.tensors]
    assert all(map(torch.equal, before, twin.state.tensors))
    twin.step(some(1))
    twin.step(some(1))
    assert all(map(torch.equal, before, session.state.tensors))
    assert (max(session.seen), max(twin.seen)) == (8, 10)
    assert_refused(twin, program, CapacityError, "used up", lambda: twin.step(some(1)))
    session.step(some(1))
    twin.reset()
    assert session.state["seen"].tolist() == [9, 9]
    assert program.calls[-1].position_ids.tolist() == [[8], [8]]


def test_a_forks_continuation_is_the_originals() -> None:
    session, _ = new_session()
    session.feed(some(7))
    twin = session.fork()
    for continued in (session, twin):
        continued.step(tokens([3], [4]))
        continued.feed(tokens([1, 2], [4, 0]))
    assert all(map(torch.equal, session.state.tensors, twin.state.tensors))
