"""The registered ops: registration is sound, results are the reference's, and buffers are mutated in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import oracles
import pytest
import torch
from by_policy import keep_by, scored_by, scored_choice
from runtime_inputs import HEADS, empty_buffers, named_tokens, random_qkv
from torch import Tensor

from xkv_fx import Budgets
from xkv_fx.layers import LayerSpec
from xkv_fx.policy import EVICTIONS
from xkv_fx.runtime import ops
from xkv_fx.runtime.selection import choose_survivors
from xkv_fx.runtime.slots import SlotPlan, slot_plans

xkv = torch.ops.xkv
SCALE = 0.35
SINKS = torch.tensor([-1.0, 0.0, 1.0, 3.0])
OPTIONS: list[dict[str, Any]] = [{}, {"softcap": 1.5}, {"sink_logits": SINKS}, {"softcap": 1.5, "sink_logits": SINKS}]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def copies(args: Sequence[Any]) -> list[Any]:
    return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]


def run_both(
    op: Any, by_loops: Callable[..., Tensor], args: Sequence[Any], **options: Any
) -> tuple[list[Any], list[Any]]:
    """Call an op and its reference on copies; each list holds the result and then the arguments as it left them."""
    tested, expected = copies(args), copies(args)
    where = [arg.data_ptr() for arg in tested if isinstance(arg, Tensor)]
    out = op(*tested, **options)
    assert [arg.data_ptr() for arg in tested if isinstance(arg, Tensor)] == where
    return [out, *tested], [by_loops(*expected, **options), *expected]


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_unchanged(left: Sequence[Any], given: Sequence[Any]) -> None:
    for after, before in zip(left, given, strict=True):
        assert not isinstance(before, Tensor) or torch.equal(after, before)


def extend_inputs(
    heads: tuple[int, int] = (4, 2), length: int = 5, dims: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float32
) -> list[Any]:
    q, k, v = random_qkv(heads, length, dims, dtype=dtype)
    _, k_cache, v_cache = random_qkv(heads, 1, dims, dtype=dtype, keys=6)
    mask = torch.rand(2, 1, 1, 6) < 0.6
    mask[0] = False
    return [q, k, v, k_cache, v_cache, mask, SCALE]


def decode_inputs(
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (8, 8),
    mask_heads: int = 1,
    dtype: torch.dtype = torch.float32,
) -> list[Any]:
    q, k, v = random_qkv(heads, 1, dims, rows=3, dtype=dtype)
    _, k_cache, v_cache = random_qkv(heads, 1, dims, rows=3, dtype=dtype, keys=6)
    slot = torch.tensor([0, 3, 5])
    valid = torch.rand(3, mask_heads, 1, 6) < 0.5
    valid[torch.arange(3), :, :, slot] = True
    valid[0] = torch.arange(6) == 0  # a row's very first token
    mask = torch.zeros(valid.shape, dtype=dtype).masked_fill(~valid, float("-inf"))
    return [q, k, v, k_cache, v_cache, slot, mask, SCALE]


def scored_inputs(
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (8, 8),
    recent: int = 2,
    sink_tokens: int = 1,
    dtype: torch.dtype = torch.float32,
) -> list[Any]:
    """Rows that have seen nothing, some tokens, as many as there are slots, and many, of which heads keep others."""
    q, k, v = random_qkv(heads, 1, dims, rows=4, dtype=dtype)
    _, k_cache, v_cache = random_qkv(heads, 1, dims, rows=4, dtype=dtype, keys=6)
    seen = torch.tensor([0, 4, 6, 30])
    positions = torch.arange(6, dtype=torch.int32).expand(4, heads[1], 6).clone()
    for head in range(heads[1]):
        older = torch.randperm(27)[:3] + 1
        positions[3, head] = torch.cat((older, torch.tensor([0, 28, 29])))[torch.randperm(6)]
    scores = torch.rand(4, heads[1], 6) * (torch.arange(6) < seen[:, None])[:, None]
    return [q, k, v, k_cache, v_cache, positions, scores, seen, SCALE, recent, sink_tokens]


def op_arguments_of_scored(
    args: list[Any], sliding_window: int | None = None, **options: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `xkv::decode_scored` for what its oracle takes."""
    q, k, v, k_cache, v_cache, positions, scores, seen, scale, recent, sinks = args
    plan = SlotPlan(6, 6, recent, sinks, "scored", sliding_window)
    slot, mask = scored_choice(positions, scores, seen, plan, q.dtype)
    return (q, k, v, k_cache, v_cache, positions, scores, slot, mask, seen, scale), options


def keep_inputs(plan: SlotPlan, fresh: bool, new: int = 9, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Inputs of `keep`; when not fresh, to a layer that has seen ten tokens, decoded two and five."""
    lengths = torch.tensor([new, (new + 1) // 2, 0])
    buffers = empty_buffers(plan, 3, 2)
    seen, base = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    if not fresh:
        base = torch.tensor([10, 3, 10])
        k, v = named_tokens(torch.zeros_like(base), 10, 2)
        plan_numbers = (plan.capacity, plan.recent, plan.sinks, EVICTIONS.index(plan.eviction), plan.sliding_window)
        oracles.keep(k, v, torch.rand(3, 2, 10), base, seen, seen, *buffers, *plan_numbers, True)
        seen = base + torch.tensor([2, 4, 2])
    k, v = named_tokens(seen, new, 2)
    scores = torch.rand(3, 2, new if fresh else plan.slots + new)
    tensors = [k, v, scores, lengths, seen, base, *buffers]
    for index in (0, 1, 6, 7):
        tensors[index] = tensors[index].to(dtype)
    numbers = [plan.capacity, plan.recent, plan.sinks, EVICTIONS.index(plan.eviction), plan.sliding_window]
    return [*tensors, *numbers, fresh]


KEEP_PLANS = {
    "ring": SlotPlan(6, 6, 2, 1, "ring"),
    "sliding-window": SlotPlan(6, 6, 2, 0, "ring", sliding_window=8),
    "append": SlotPlan(6, 12, 2, 0, "append"),
    "none": SlotPlan(40, 40, 10, 0, "none"),
}
each_keep_plan = pytest.mark.parametrize("plan", list(KEEP_PLANS.values()), ids=list(KEEP_PLANS))


# Registration


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 3, "softcap": 1.5, "sink_logits": SINKS}], ids=["plain", "all"]
)
def test_opcheck_attention(options: dict[str, Any]) -> None:
    torch.library.opcheck(xkv.attention.default, (*random_qkv((4, 2), 5, (8, 6)), 0, SCALE), options)


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 3, "softcap": 1.5, "sink_logits": SINKS}], ids=["plain", "all"]
)
def test_opcheck_extend_attention(options: dict[str, Any]) -> None:
    torch.library.opcheck(xkv.extend_attention.default, tuple(extend_inputs(dims=(8, 6))), options)


@pytest.mark.parametrize("fresh", [True, False])
def test_opcheck_keep(fresh: bool) -> None:
    for plan in (KEEP_PLANS["sliding-window"], KEEP_PLANS["append"]):
        k, v, scores, length, seen, base, *buffers = keep_inputs(plan, fresh)[:9]
        source, placed, _ = choose_survivors(scores, buffers[2], length, seen, base, plan, fresh)
        torch.library.opcheck(xkv.keep.default, (k, v, source, placed, *buffers, plan.capacity, fresh))


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "sink_logits": SINKS}], ids=["plain", "all"])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (4, 1)], ids=str)
def test_opcheck_decode_attention(options: dict[str, Any], heads: tuple[int, int]) -> None:
    torch.library.opcheck(xkv.decode_attention.default, tuple(decode_inputs(heads, dims=(8, 6))), options)


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 9, "softcap": 1.5, "sink_logits": SINKS}], ids=["plain", "all"]
)
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (4, 1)], ids=str)
def test_opcheck_decode_scored(options: dict[str, Any], heads: tuple[int, int]) -> None:
    args, options = op_arguments_of_scored(scored_inputs(heads, dims=(8, 6)), **options)
    torch.library.opcheck(xkv.decode_scored.default, args, options)


@pytest.mark.parametrize("name", ["attention", "extend_attention", "keep", "decode_attention", "decode_scored"])
def test_schemas_take_no_strings_and_say_what_they_mutate(name: str) -> None:
    schema = getattr(xkv, name).default._schema
    mutated = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
    buffers = {
        "keep": {"k_cache", "v_cache", "positions"},
        "decode_attention": {"k_cache", "v_cache"},
        "decode_scored": {"k_cache", "v_cache", "positions", "scores"},
    }
    assert mutated == buffers.get(name, set())
    assert "str" not in str(schema)
    if name in ("keep", "decode_scored"):  # whose oracles hold the policy too
        return
    by_loops = getattr(oracles, name)
    assert [argument.name for argument in schema.arguments] == list(by_loops.__annotations__)[:-1]


def test_fake_results_have_the_shape_and_dtype_of_real_ones() -> None:
    cases: list[tuple[Any, list[Any]]] = [
        (xkv.attention, [*random_qkv((4, 2), 5, (8, 6), dtype=torch.bfloat16), 0, SCALE]),
        (xkv.extend_attention, extend_inputs(dims=(8, 6))),
        (xkv.decode_attention, decode_inputs(dims=(8, 6))),
        (xkv.decode_scored, list(op_arguments_of_scored(scored_inputs(dims=(8, 6), dtype=torch.bfloat16))[0])),
    ]
    for op, args in cases:
        fake = op(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))
        real = op(*copies(args))
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


# Results


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention(heads: tuple[int, int], sliding_window: int | None, softcap: float | None) -> None:
    for length, dims in ((1, (8, 8)), (7, (8, 8)), (7, (8, 5))):
        args = [*random_qkv(heads, length, dims), 0, SCALE, sliding_window, softcap, torch.randn(heads[0])]
        tested, expected = run_both(xkv.attention, oracles.attention, args)
        assert_near(tested[0], expected[0])
        assert_unchanged(tested[1:], args)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_extend_attention(heads: tuple[int, int], sliding_window: int | None, softcap: float | None) -> None:
    options = {"sliding_window": sliding_window, "softcap": softcap, "sink_logits": torch.randn(heads[0])}
    for length, dims in ((1, (8, 8)), (7, (8, 8)), (7, (8, 5))):
        args = extend_inputs(heads, length, dims)
        tested, expected = run_both(xkv.extend_attention, oracles.extend_attention, args, **options)
        assert_near(tested[0], expected[0])
        assert_unchanged(tested[1:], args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [*OPTIONS, {"sliding_window": 3}], ids=str)
def test_other_precisions(dtype: torch.dtype, options: dict[str, Any]) -> None:
    args: list[Any] = [*random_qkv((4, 2), 6, dtype=dtype), 0, SCALE]
    tested, expected = run_both(xkv.attention, oracles.attention, args, **options)
    assert_near(tested[0], expected[0])
    tested, expected = run_both(xkv.extend_attention, oracles.extend_attention, extend_inputs(dtype=dtype), **options)
    assert_near(tested[0], expected[0])
    options = {name: value for name, value in options.items() if name != "sliding_window"}  # in decode, a mask
    tested, expected = run_both(xkv.decode_attention, oracles.decode_attention, decode_inputs(dtype=dtype), **options)
    assert_near(tested[0], expected[0])


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dims", [(8, 8), (8, 5)], ids=str)
@pytest.mark.parametrize("use_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_decode_attention(
    heads: tuple[int, int], dims: tuple[int, int], use_sinks: bool, softcap: float | None
) -> None:
    options = {"softcap": softcap, "sink_logits": torch.randn(heads[0]) if use_sinks else None}
    for mask_heads in {1, heads[1]}:
        args = decode_inputs(heads, dims, mask_heads)
        tested, expected = run_both(xkv.decode_attention, oracles.decode_attention, args, **options)
        assert_near(tested[0], expected[0])
        for after, by_loops in zip(tested[4:6], expected[4:6], strict=True):
            assert torch.equal(after, by_loops)
        assert_unchanged([*tested[1:4], *tested[6:]], [*args[:3], *args[5:]])


def test_decode_attention_writes_one_slot_a_row() -> None:
    args = decode_inputs()
    given = copies(args)
    xkv.decode_attention(*args)
    for cache, before, new in zip(args[3:5], given[3:5], given[1:3], strict=True):
        for row, slot in enumerate([0, 3, 5]):
            assert torch.equal(cache[row, :, slot], new[row, :, 0])
            others = torch.arange(6) != slot
            assert torch.equal(cache[row][:, others], before[row][:, others])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decode_decomposition_is_the_op(options: dict[str, Any]) -> None:
    decomposed = ops.DECOMPOSITIONS[xkv.decode_attention.default]
    args = decode_inputs(dims=(8, 6))
    tested, expected = run_both(decomposed, oracles.decode_attention, args, **options)
    assert_near(tested[0], expected[0])
    for after, by_loops in zip(tested[4:6], expected[4:6], strict=True):
        assert torch.equal(after, by_loops)


def assert_same_step(tested: Sequence[Any], expected: Sequence[Any], given: Sequence[Any]) -> None:
    """Outputs and scores are near; K/V and positions, moved and not computed, are the same; nothing else changed."""
    assert_near(tested[0], expected[0])
    for index in (4, 5, 6):
        assert torch.equal(tested[index], expected[index])
    torch.testing.assert_close(tested[7], expected[7], rtol=0, atol=max(TOLERANCE[given[0].dtype], 2e-6))
    assert_unchanged([*tested[1:4], *tested[8:]], [*given[:3], *given[7:]])


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("recent", "sink_tokens"), [(1, 0), (2, 1), (4, 2), (6, 0)], ids=str)
@pytest.mark.parametrize("sliding_window", [None, 9, 40])
def test_decode_scored(heads: tuple[int, int], recent: int, sink_tokens: int, sliding_window: int | None) -> None:
    options = {"sliding_window": sliding_window, "softcap": 1.5, "sink_logits": torch.randn(heads[0])}
    for some, dims in ((options, (8, 5)), ({"sliding_window": sliding_window}, (8, 8))):
        args = scored_inputs(heads, dims, recent, sink_tokens)
        assert_same_step(*run_both(scored_by(xkv.decode_scored), oracles.decode_scored, args, **some), args)
        decomposed = ops.DECOMPOSITIONS[xkv.decode_scored.default]
        assert_same_step(*run_both(scored_by(decomposed), oracles.decode_scored, args, **some), args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_decode_scored_in_other_precisions(dtype: torch.dtype) -> None:
    args = scored_inputs(dtype=dtype)
    assert_same_step(*run_both(scored_by(xkv.decode_scored), oracles.decode_scored, args, sink_logits=SINKS), args)


@pytest.mark.parametrize("sliding_window", [None, 9])
def test_decode_scored_step_by_step(sliding_window: int | None) -> None:
    """Scores accumulate, and decide many steps later; the mass that a step hands out is one, shared by the slots."""
    args = scored_inputs(recent=2, sink_tokens=1)
    tested, expected = copies(args), copies(args)
    for step in range(25):
        seen = args[7] + step
        token = random_qkv((4, 2), 1, rows=4)
        before = tested[6].clone()
        for state, op in ((tested, scored_by(xkv.decode_scored)), (expected, oracles.decode_scored)):
            state[:3], state[7], kept = copies(token), seen.clone(), state[5].clone()
            out = op(*state, sliding_window=sliding_window)
            if state is tested:
                new = (state[5] != kept) | ((seen < 6)[:, None, None] & (torch.arange(6) == seen[:, None, None]))
                gained = (state[6] - before.masked_fill(new, 0.0)).sum(-1)
                torch.testing.assert_close(gained, torch.ones_like(gained), rtol=0, atol=1e-5)
                result = out
        assert_near(result, out)
        for index in (3, 4, 5):
            assert torch.equal(tested[index], expected[index])
        torch.testing.assert_close(tested[6], expected[6], rtol=0, atol=1e-5)


def test_decode_scored_written_down() -> None:
    """Token 9 comes to slots that hold 0, 5, 3 and 8; the least score that is no sink and not recent goes."""
    q = k = v = torch.ones(1, 1, 1, 1)
    k_cache, v_cache = torch.zeros(1, 1, 4, 1), torch.tensor([[[[1.0], [2.0], [3.0], [4.0]]]])
    positions, scores = torch.tensor([[[0, 5, 3, 8]]], dtype=torch.int32), torch.tensor([[[0.0, 0.3, 0.2, 0.1]]])
    seen = torch.tensor([9])
    out = scored_by(xkv.decode_scored)(q, 0 * k, 9 * v, k_cache, v_cache, positions, scores, seen, 1.0, 2, 1)
    assert positions.tolist() == [[[0, 5, 9, 8]]]
    assert v_cache.flatten().tolist() == [1, 2, 9, 4]
    torch.testing.assert_close(out.flatten(), torch.tensor([(1.0 + 2 + 9 + 4) / 4]))
    torch.testing.assert_close(scores.flatten(), torch.tensor([0.25, 0.55, 0.25, 0.35]))


@each_keep_plan
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("new", [1, 9, 20])
def test_keep(plan: SlotPlan, fresh: bool, new: int) -> None:
    args = keep_inputs(plan, fresh, new)
    tested, expected = run_both(keep_by(xkv.keep), oracles.keep, args)
    seen = args[3] if fresh else args[4] + args[3]
    base = args[3] if fresh else torch.where(args[3] > 0, seen, args[5])
    ordinals = plan.ordinals(tested[9], seen, base)
    out_of_window = torch.zeros_like(ordinals, dtype=torch.bool)
    if plan.sliding_window is not None:
        out_of_window = ordinals <= (seen - plan.sliding_window)[:, None, None]
    settled = (ordinals >= 0) & ~out_of_window
    assert settled.any(-1)[:2].all()
    for index in (7, 8, 9):
        same = settled if index == 9 else settled[..., None]
        assert torch.equal(tested[index].where(same, 0), expected[index].where(same, 0))
    chosen = args[3] > 0
    assert torch.equal(tested[0].where(settled, 0)[chosen], expected[0].where(settled, 0)[chosen])
    assert not tested[0][chosen][(ordinals < 0)[chosen]].any()
    assert_unchanged(tested[1:7], args[:6])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_keep_moves_half_precision_bits(dtype: torch.dtype) -> None:
    plan = KEEP_PLANS["ring"]
    args = keep_inputs(plan, fresh=False, dtype=dtype)
    args[0], args[1] = torch.randn(args[0].shape).to(dtype), torch.randn(args[1].shape).to(dtype)
    tested, expected = run_both(keep_by(xkv.keep), oracles.keep, args)
    for index in (7, 8, 9):
        assert torch.equal(tested[index][:2], expected[index][:2])


def test_keep_gathers_before_it_overwrites() -> None:
    """Survivors move from slot to slot within one buffer; none may be overwritten before it has been read."""
    plan = SlotPlan(6, 6, 1, 0, "scored")
    k_cache, v_cache, positions = empty_buffers(plan, 1, 1)
    reversed_tokens = torch.arange(5, -1, -1)
    k_cache[0, 0, :, 0] = v_cache[0, 0, :, 0] = reversed_tokens.float()
    positions[0, 0] = reversed_tokens.int()
    k, v = torch.full((1, 1, 1, 2), 6.0), torch.full((1, 1, 1, 3), 6.0)
    six, one = torch.tensor([6]), torch.tensor([1])
    scores = torch.tensor([[[6.0, 5, 0, 3, 2, 1, 0]]])  # token 3 goes
    eviction = EVICTIONS.index("scored")
    gained = keep_by(xkv.keep)(k, v, scores, one, six, six, k_cache, v_cache, positions, 6, 1, 0, eviction, None, False)
    assert positions.tolist() == [[[0, 1, 2, 4, 5, 6]]]
    assert k_cache[0, 0, :, 0].tolist() == v_cache[0, 0, :, 0].tolist() == [0, 1, 2, 4, 5, 6]
    assert gained.tolist() == [[[1, 2, 3, 5, 6, 0]]]


# One layer through a conversation, from outputs only


@pytest.mark.parametrize(
    "plan",
    [SlotPlan(24, 24, 6, 0, "ring"), SlotPlan(6, 26, 1, 0, "append"), SlotPlan(24, 24, 6, 0, "none")],
    ids=lambda plan: plan.eviction,
)
def test_nothing_evicted_is_plain_attention(plan: SlotPlan) -> None:
    """Prefill, decode and a further turn, with room for every token, give what one causal pass over all gives."""
    q, k, v = random_qkv((4, 2), 20)
    prompt = 9 if plan.capacity >= 20 else plan.capacity
    outs = conversation(plan, q, k, v, layer_buffers(plan), prompt, steps=4)
    assert_near(outs, oracles.attention(q, k, v, 0, SCALE))


@pytest.mark.parametrize("sliding_window", [1, 5, 7])
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_whole_sliding_window_is_exact(sliding_window: int, steps: int) -> None:
    """A layer that holds its whole sliding window loses nothing that a query may read."""
    spec = LayerSpec(4, 2, 8, 8, 4, sliding_window)
    (plan,) = slot_plans(Budgets((100,)), (spec,))
    q, k, v = random_qkv((4, 2), 24)
    expected = oracles.attention(q, k, v, 0, SCALE, sliding_window)
    for prompt in (3, 7, 12):
        assert_near(conversation(plan, q, k, v, layer_buffers(plan), prompt, steps, sliding_window), expected)


def test_decode_ring_keeps_prompt_entries() -> None:
    """Each step of decode attends to the prompt's survivors and the newest `recent` tokens, and to nothing else."""
    plan = SlotPlan(8, 8, 3, 0, "ring")
    q, k, v = random_qkv((4, 2), 40)
    buffers = layer_buffers(plan)
    prompt = 15
    outs = conversation(plan, q, k, v, buffers, prompt, steps=25)
    survivors = buffers[2][:, :, :5].clone()
    for index in (0, 1):
        entries = (k, v)[index].gather(2, survivors[..., None].expand(-1, -1, -1, 8).long())
        assert torch.equal(buffers[index][:, :, :5], entries)

    def reach(row: int, head: int, query: int) -> list[int]:
        token = prompt + query
        return [*survivors[row, head].tolist(), *range(token - 2, token + 1)]

    expected, _ = oracles.attend(q[:, :, prompt:], k, v, reach, SCALE)
    assert_near(outs[:, :, prompt:], expected.float())


def layer_buffers(plan: SlotPlan) -> list[Tensor]:
    return empty_buffers(plan, 2, 2, 8, 8)


def conversation(
    plan: SlotPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buffers: list[Tensor],
    prompt: int,
    steps: int,
    sliding_window: int | None = None,
) -> Tensor:
    """Outputs of one layer: a fresh prefill of `prompt` tokens, `steps` of decode, and the rest as a further turn."""
    rows, total = q.shape[0], q.shape[2]
    none, count = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), prompt)
    numbers = (plan.capacity, plan.recent, plan.sinks, EVICTIONS.index(plan.eviction), plan.sliding_window)
    part = [x[:, :, :prompt] for x in (q, k, v)]
    outs = [xkv.attention(*part, 0, SCALE, sliding_window)]
    keep_by(xkv.keep)(
        part[1], part[2], torch.rand(rows, k.shape[1], prompt), count, none, none, *buffers, *numbers, True
    )
    seen, base = count.clone(), count.clone()
    for step in range(prompt, prompt + steps):
        token = [x[:, :, step : step + 1] for x in (q, k, v)]
        valid = plan.decode_mask(buffers[2], seen, base)
        mask = torch.zeros(valid.shape).masked_fill(~valid, float("-inf"))
        outs.append(xkv.decode_attention(*token, *buffers[:2], plan.next_slot(seen, base), mask, SCALE))
        seen = seen + 1
    if total > prompt + steps:
        part = [x[:, :, prompt + steps :] for x in (q, k, v)]
        mask = plan.extend_mask(buffers[2], seen, base, part[0].shape[2])
        outs.append(xkv.extend_attention(*part, *buffers[:2], mask, SCALE, sliding_window))
    return torch.cat(outs, 2)
