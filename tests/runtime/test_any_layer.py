"""One layer through any conversation: every op is its reference and its decomposed form, and its cache holds what it
may: no token twice, as many as the plan says, nothing of padding, and of each the very keys and values it came with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import oracles
import pytest
import torch
from by_policy import keep_by, scored_by
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from xkv_fx import Budgets
from xkv_fx.layers import LayerSpec
from xkv_fx.policy import EVICTIONS, Eviction, Policy
from xkv_fx.runtime import any_length, ops
from xkv_fx.runtime.attention import distance_bias
from xkv_fx.runtime.slots import EMPTY, SlotPlan, slot_plans

xkv = torch.ops.xkv
SCALE = 0.4
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
PADDING = 900.0
"""What stands where no token is: finite, since a mask cannot take away what is none, and too large to hide."""
ROOMY = 64
"""Capacity of layers that never evict: more than the tokens of any conversation here."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What one layer is like.

    Attributes:
        heads: query heads and KV heads.
        dims: of keys and values.
        options: softcap, sinks and slopes of its attention, where it has them.
    """

    plan: SlotPlan
    heads: tuple[int, int]
    dims: tuple[int, int]
    rows: int
    dtype: torch.dtype
    options: dict[str, Any]
    seed: int

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Heads and dimensions of queries, keys and values."""
        (query_heads, kv_heads), (key_dim, value_dim) = self.heads, self.dims
        return [(query_heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads = (kv_heads * group, kv_heads)
    dims = draw(st.sampled_from([(4, 4), (4, 3), (2, 6)]))
    sliding_window = draw(st.none() | st.integers(1, 12))
    eviction: Eviction = draw(st.sampled_from(get_args(Eviction)))
    policy = Policy(eviction=eviction, recent=draw(st.none() | st.integers(1, 9)), sinks=draw(st.integers(0, 3)))
    capacity = ROOMY if eviction == "none" else draw(st.integers(1, 10))
    spec = LayerSpec(*heads, *dims, 4, sliding_window)
    (plan,) = slot_plans(Budgets((capacity,), policy), (spec,), draw(st.integers(0, 8)))
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["softcap"] = 1.5
    if draw(st.booleans()):
        options["sink_logits"] = torch.randn(heads[0], generator=generator)
    if draw(st.booleans()):
        options["slopes"] = torch.rand(heads[0], generator=generator)
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    return Case(plan, heads, dims, draw(st.integers(1, 3)), dtype, options, seed)


class Conversation:
    """A layer's buffers, and beside them every token that its rows have ever seen."""

    def __init__(self, case: Case) -> None:
        self.case, self.plan = case, case.plan
        self.generator = torch.Generator().manual_seed(case.seed + 1)
        shape = (case.rows, case.heads[1], self.plan.slots)
        self.k_cache, self.v_cache = (torch.full((*shape, dim), PADDING, dtype=case.dtype) for dim in case.dims)
        self.positions = torch.arange(self.plan.slots, dtype=torch.int32).expand(shape).contiguous()
        self.scores = torch.zeros(shape)
        self.seen = torch.zeros(case.rows, dtype=torch.int64)
        self.base = self.seen.clone()
        self.queries, self.keys, self.values = (
            [torch.zeros(heads, 0, dim, dtype=case.dtype) for _ in range(case.rows)] for heads, dim in case.sizes
        )

    def tokens(self, lengths: Sequence[int], columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of new tokens, padding behind those of each row; they become part of the history."""
        case = self.case
        q, k, v = (
            torch.randn(case.rows, heads, columns, dim, generator=self.generator).to(case.dtype)
            for heads, dim in case.sizes
        )
        for row, length in enumerate(lengths):
            q[row, :, length:], k[row, :, length:], v[row, :, length:] = 0, PADDING, PADDING
            for history, new in ((self.queries, q), (self.keys, k), (self.values, v)):
                history[row] = torch.cat((history[row], new[row, :, :length]), 1)
        return q, k, v

    def prompt(self, lengths: Sequence[int], columns: int) -> None:
        """A prompt, or a further turn: attention, then the survivors are chosen by scores drawn at random."""
        plan, fresh = self.plan, not bool(self.seen.any())
        held = self.ordinals()
        q, k, v = self.tokens(lengths, columns)
        if fresh:
            op, arguments = xkv.attention, [q, k, v, 0, SCALE, plan.sliding_window]
        else:
            op = xkv.extend_attention
            mask = plan.extend_mask(self.positions, self.seen, self.base, columns)
            arguments = [q, k, v, self.k_cache, self.v_cache, mask, SCALE, plan.sliding_window]
        options = dict(self.case.options)
        if not fresh and "slopes" in options:
            options["ages"] = plan.extend_ages(self.positions, self.seen, self.base)
        by_loops = getattr(oracles, op.default._schema.name[5:])
        out = self.run(op, (any_length.ANY_LENGTH[op.default], by_loops), arguments, options, lengths)
        for row, length in enumerate(lengths):
            self.compare(out, row, [(index, held[row]) for index in range(length)], int(self.seen[row]))
        self.keep(k, v, torch.tensor(lengths), fresh)

    def keep(self, k: Tensor, v: Tensor, length: Tensor, fresh: bool) -> None:
        plan, candidates = self.plan, k.shape[2] if fresh else self.plan.slots + k.shape[2]
        scores = torch.rand(*k.shape[:2], candidates, generator=self.generator)
        numbers = (plan.capacity, plan.recent, plan.sinks, EVICTIONS.index(plan.eviction), plan.sliding_window, fresh)
        before = [k, v, scores, length, self.seen, self.base, self.k_cache, self.v_cache, self.positions]
        forms = [copied(before), copied(before)]
        self.scores = keep_by(xkv.keep)(*before, *numbers)
        again = keep_by(ops.DECOMPOSITIONS[xkv.keep.default])(*forms[0], *numbers)  # type: ignore[arg-type]
        assert torch.equal(again, self.scores)
        assert all(torch.equal(one, other) for one, other in zip(forms[0], before, strict=True))
        oracles.keep(*forms[1], *numbers)
        self.seen = length if fresh else self.seen + length
        self.base = length if fresh else torch.where(length > 0, self.seen, self.base)
        kept = self.check()
        by_loops = forms[1][8]
        for row, heads in enumerate(kept):
            reach = int(self.seen[row]) - (plan.sliding_window or self.seen.max() + 1)
            for head, now in enumerate(heads):
                expected = oracles.reference_ordinals(
                    by_loops[row, head].tolist(), int(self.seen[row]), int(self.base[row]), plan
                )
                useful = {token for token in expected if token > max(EMPTY, reach)}
                assert {token for token in now if token > max(EMPTY, reach)} == useful
                if length[row] > 0:
                    assert sum(token != EMPTY for token in now) == min(int(self.seen[row]), plan.capacity)

    def step(self) -> None:
        """One decoded token a row."""
        case, plan = self.case, self.plan
        q, k, v = self.tokens([1] * case.rows, 1)
        options = {name: value for name, value in case.options.items() if name != "slopes"}
        if plan.eviction == "scored":
            tail = (plan.recent, plan.sinks, plan.sliding_window)
            state = [q, k, v, self.k_cache, self.v_cache, self.positions, self.scores, self.seen, SCALE, *tail]
            slopes = {name: case.options[name] for name in case.options if name == "slopes"}
            forms = (scored_by(ops.DECOMPOSITIONS[xkv.decode_scored.default]), oracles.decode_scored)
            out = self.run(scored_by(xkv.decode_scored), forms, state, {**options, **slopes})
        else:
            slot = plan.next_slot(self.seen, self.base)
            valid = plan.decode_mask(self.positions, self.seen, self.base)
            mask = torch.zeros(valid.shape, dtype=case.dtype)
            if "slopes" in case.options:
                ages = plan.decode_ages(self.positions, self.seen, self.base)
                mask = distance_bias(case.options["slopes"], ages[:, :, None]).flatten(1, 2)
                valid = valid.repeat_interleave(case.heads[0] // valid.shape[1], 1)
            mask = mask.masked_fill(~valid, float("-inf"))
            op = xkv.decode_attention
            state = [q, k, v, self.k_cache, self.v_cache, slot, mask, SCALE]
            forms = (ops.DECOMPOSITIONS[op.default], oracles.decode_attention)
            out = self.run(op, forms, state, options)
        before = self.seen
        self.seen = self.seen + 1
        held = self.check()
        for row, now in enumerate(held):
            assert all(int(before[row]) in head for head in now)
            self.compare(out, row, [(0, now)], int(before[row]))

    def run(
        self,
        op: Any,
        others: tuple[Any, Any],
        arguments: list[Any],
        options: dict[str, Any],
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Call an op on the layer's own buffers, its decomposed form and its reference on copies; all must agree.

        Args:
            others: these two.
            lengths: of each row; what queries of padding get means nothing.
        """
        forms = [copied(arguments), copied(arguments)]
        out: Tensor = op(*arguments, **options)
        for form, call in zip(forms, others, strict=True):
            other = call(*form, **options)
            for row in range(self.case.rows):
                stop = None if lengths is None else lengths[row]
                self.near(out[row, :, :stop], other[row, :, :stop])
            for ours, theirs in zip(arguments, form, strict=True):
                if isinstance(ours, Tensor) and ours.dtype == torch.float32 and ours is self.scores:
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=max(1e-5, TOLERANCE[self.case.dtype]))
                elif isinstance(ours, Tensor):
                    assert torch.equal(ours, theirs)
        return out

    def compare(self, out: Tensor, row: int, queries: list[tuple[int, list[list[int]]]], start: int) -> None:
        """Outputs against attention over the history itself: each query reads what the layer held, and the new tokens.

        Args:
            queries: for each, its column and the ordinals that each KV head held.
            start: the ordinal of column 0.
        """
        window, options = self.plan.sliding_window, self.case.options
        slopes = options.get("slopes")
        for column, held in queries:
            query = start + column

            def reach(_: int, head: int, __: int, query: int = query, held: list[list[int]] = held) -> list[int]:
                tokens = sorted({*held[head], *range(start, query + 1)} - {EMPTY})
                return [token for token in tokens if window is None or token > query - window]

            def bias(_: int, head: int, __: int, token: int, query: int = query) -> float:
                return -float(slopes[head]) * (query - token) if slopes is not None else 0.0

            expected, _ = oracles.attend(
                self.queries[row][None, :, query : query + 1],
                self.keys[row][None],
                self.values[row][None],
                reach,
                SCALE,
                options.get("softcap"),
                options.get("sink_logits"),
                bias,
            )
            self.near(out[row, :, column], expected[0, :, 0].to(out.dtype))

    def ordinals(self) -> list[list[list[int]]]:
        found: list[list[list[int]]] = self.plan.ordinals(self.positions, self.seen, self.base).tolist()
        return found

    def check(self) -> list[list[list[int]]]:
        """What must hold of the cache whenever nothing runs; returns what each row and head holds."""
        held = self.ordinals()
        count = self.plan.count(self.seen, self.base).tolist()
        for row, heads in enumerate(held):
            total = int(self.seen[row])
            for head, slots in enumerate(heads):
                kept = [token for token in slots if token != EMPTY]
                assert len(slots) == self.plan.slots
                assert len(set(kept)) == len(kept) == count[row] <= min(total, self.plan.slots)
                assert all(0 <= token < total for token in kept)
                assert set(range(max(0, total - self.plan.recent), total)) <= set(kept)
                assert set(range(gone(self.plan, total), min(self.plan.sinks, total))) <= set(kept)
                for slot, token in enumerate(slots):
                    if token != EMPTY:
                        assert torch.equal(self.k_cache[row, head, slot], self.keys[row][head, token])
                        assert torch.equal(self.v_cache[row, head, slot], self.values[row][head, token])
        return held

    def near(self, got: Tensor, expected: Tensor) -> None:
        tolerance = TOLERANCE[self.case.dtype]
        if "slopes" in self.case.options:  # the bias that they add is float32, whatever the logits are
            tolerance = max(tolerance, 1e-6)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)

    def steps_left(self) -> int:
        if self.plan.eviction != "append" or self.plan.takes_turns:
            return 12
        return self.plan.slots - int(self.plan.count(self.seen, self.base).max())


def gone(plan: SlotPlan, total: int) -> int:
    """How many of the first tokens decode may have overwritten, sinks or not, since they left the sliding window."""
    overwrites = plan.takes_turns or plan.eviction == "scored"
    return max(0, total - plan.sliding_window) if overwrites and plan.sliding_window is not None else 0


def copied(arguments: Sequence[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in arguments]


@pytest.fixture(scope="module", autouse=True)
def _loops_run_as_they_are() -> Iterator[None]:
    """Eagerly, torch would compile each loop anew for every shape."""

    def looped(go_on: Callable[..., Tensor], body: Callable[..., Any], carried: Any) -> Any:
        while go_on(*carried):
            carried = body(*carried)
        return carried

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(any_length, "while_loop", looped)
        yield


@given(case=cases(), data=st.data())
@examples(50)
def test_any_layer_in_any_conversation(case: Case, data: st.DataObject) -> None:
    layer = Conversation(case)
    for _ in range(data.draw(st.integers(1, 3))):
        lengths = data.draw(st.lists(st.integers(0, 9), min_size=case.rows, max_size=case.rows).filter(any))
        layer.prompt(lengths, max(lengths) + data.draw(st.integers(0, 2)))
        for _step in range(min(layer.steps_left(), data.draw(st.integers(0, 5)))):
            layer.step()
