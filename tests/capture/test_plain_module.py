"""Plain PyTorch decoders, against themselves run again on the whole sequence at every step."""

from __future__ import annotations

import functools
from collections.abc import Callable

import plain_models as plain
import pytest
import torch
from old_versions import OLD_TORCH
from plain_models import HEAD_DIM, HEADS, POSITIONS, SLIDING_WINDOW, Attend, Decoder, decoder, example, random_ids
from torch import Tensor, nn

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.capture.plain_module import capture_module
from xkv_fx.errors import BackendError, CapacityError, PromptError, SessionError, UnsupportedModelError
from xkv_fx.lowering.plain import BudgetedModule
from xkv_fx.passes.tools.graph import calls

MODELS: dict[str, Callable[[], Decoder]] = {
    "sdpa": lambda: decoder(plain.sdpa),
    "sdpa, boolean mask": lambda: decoder(plain.sdpa_bool_mask),
    "sdpa, sliding window": lambda: decoder(plain.sdpa_sliding),
    "sdpa, ALiBi": lambda: decoder(plain.sdpa_alibi),
    "written out": lambda: decoder(plain.written_out),
    "added mask": lambda: decoder(plain.added_mask),
    "heads as rows": lambda: decoder(plain.batched),
    "grouped, repeated": lambda: decoder(plain.sdpa, kv_heads=2, interleave=True),
    "grouped, expanded": lambda: decoder(plain.written_out, kv_heads=2),
    "ALiBi, grouped": lambda: decoder(plain.sdpa_alibi, kv_heads=2),
    "positions counted": lambda: decoder(plain.sdpa, counted=True),
    "angles counted": lambda: decoder(plain.rotary_counted, kv_heads=4),
    "MultiheadAttention with weights": lambda: Decoder(lambda: plain.TorchAttention(need_weights=True)),
}
if not OLD_TORCH:  # torch 2.11 exports a view that cannot be, so that it is refused
    MODELS["MultiheadAttention"] = lambda: Decoder(lambda: plain.TorchAttention(need_weights=False))


def transform(model: nn.Module, budgets: Budgets, rows: int = 1, backend: str = "eager") -> BudgetedModule:
    return xkv_fx.transform(model, budgets, batch_size=rows, backend=backend, example_inputs=example())


@functools.cache
def full(name: str) -> tuple[Decoder, BudgetedModule]:
    model = MODELS[name]().train()  # it is captured in evaluation mode, whatever it is in
    llm = transform(model, Budgets.full(2, 60), rows=2)
    assert model.training
    return model.eval(), llm


@pytest.mark.parametrize("name", MODELS)
def test_full_budgets_are_exact(name: str) -> None:
    model, llm = full(name)
    ids = random_ids(2, 20)
    expected, logits = plain.greedy_by_recomputing(model, ids, 24)
    assert torch.equal(llm.generate(ids, 24), expected)
    session = llm.new_session()
    got = [session.feed(expected[:, :20])]
    got.append(session.feed(expected[:, 20:27]))
    got += [session.step(token) for token in expected[:, 27:-1].split(1, 1)]
    torch.testing.assert_close(torch.cat(got, 1), logits[:, [0, *range(7, 24)]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_is_found_with_what_it_caches(name: str) -> None:
    found = full(name)[1].program.graphs.captured
    kv_heads = 2 if "grouped" in name else HEADS
    window = SLIDING_WINDOW if "sliding" in name else None
    for spec in found.layers:
        assert (spec.query_heads, spec.kv_heads, spec.key_dim, spec.value_dim) == (HEADS, kv_heads, HEAD_DIM, HEAD_DIM)
        assert spec.sliding_window == window
    assert len(found.layers) == 2
    assert (found.facts.name, found.facts.has_latents) == ("Decoder", False)
    assert found.max_positions == POSITIONS
    assert found.vocabulary == plain.VOCABULARY
    for node in calls(found.prompt, torch.ops.xkv.attention.default):
        assert (len(node.args) > 8) == ("ALiBi" in name)


@pytest.mark.parametrize("policy", [Policy(), Policy(eviction="scored", scorer="h2o"), Policy(scorer="tova", sinks=1)])
@pytest.mark.parametrize("name", ["sdpa, ALiBi", "ALiBi, grouped", "sdpa, sliding window"])
def test_tight_budgets_keep_to_their_bytes(name: str, policy: Policy) -> None:
    llm = full(name)[1].with_budgets(Budgets((6, 9), policy))
    session = llm.new_session()
    out = llm.generate(random_ids(2, 30), 40, session=session)
    assert out.shape == (2, 70)
    slots = [min(capacity, SLIDING_WINDOW) if "sliding" in name else capacity for capacity in (6, 9)]
    kv_heads = 2 if "grouped" in name else HEADS
    assert session.state.kv_bytes == llm.kv_bytes == sum(slots) * 2 * kv_heads * HEAD_DIM * 4 * 2


def test_alibi_of_kept_tokens_follows_their_positions() -> None:
    """One layer's attention after eviction, by the slopes and the ordinals that the session says it keeps."""
    llm = transform(MODELS["sdpa, ALiBi"](), Budgets((7, 60), Policy(recent=3)))
    session = llm.new_session()
    session.feed(random_ids(1, 30))
    node, _ = calls(llm.decode, torch.ops.xkv.decode_attention.default)
    recorded: list[Tensor] = []

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            if n is node:
                recorded.append(self.env[n.args[6]])  # type: ignore[index]
            return super().run_node(n)

    with torch.no_grad():
        Recorder(llm.decode).run(random_ids(1, 1), torch.tensor([[30]]), *session.state.tensors)
    kept = session.ordinals(0)
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    torch.testing.assert_close(recorded[0][:, :, 0], -slopes[None, :, None] * (30 - kept))


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (plain.bidirectional, "scaled_dot_product_attention attends to all tokens"),
        (plain.prefix, "scaled_dot_product_attention attends to tokens that come later"),
        (plain.dilated, "the mask of scaled_dot_product_attention is neither causal nor a sliding window"),
        (plain.late_window, "the mask of scaled_dot_product_attention is neither causal nor a sliding window"),
        (plain.bent_bias, "the bias of scaled_dot_product_attention is not linear"),
        (plain.by_content, "the mask of scaled_dot_product_attention, .*, depends on the tokens"),
        (plain.content_bias, "add_1, in the logits of softmax, mixes values that depend on the tokens"),
        (plain.squared, "pow_1, in the logits of softmax, is aten.pow"),
        (plain.random_weights, "scaled_dot_product_attention is random"),
    ],
)
def test_what_is_no_causal_attention_is_refused_by_the_nodes_name(attend: Attend, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^Decoder cannot be captured: {message}"):
        capture_module(decoder(attend), example())


class Sum(nn.Module):
    """A recurrent state, in its simplest form."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.cumsum(1)


class Drop(nn.Module):
    """Dropout that evaluation mode does not switch off."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, 0.1, training=True)


@pytest.mark.parametrize(
    ("mix", "message"), [(Sum(), "keeps something of earlier tokens"), (Drop(), "dropout.* is ran")]
)
def test_what_else_a_cache_would_get_wrong_is_refused(mix: nn.Module, message: str) -> None:
    model = Decoder(lambda: plain.Attention(plain.sdpa, HEADS, False), mix=mix)
    with pytest.raises(UnsupportedModelError, match=message):
        capture_module(model, example())


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Linear(2, 2), example(), "Linear cannot be captured"),
        (nn.Embedding(61, 4), example(), "Embedding cannot be captured"),
        (lambda ids, positions: ids, example(), "expected a torch.nn.Module"),
        (decoder(plain.sdpa), random_ids(1, 4), "must be .input_ids, position_ids."),
        (decoder(plain.sdpa), (random_ids(1, 4), random_ids(1, 5)), "same shape"),
        (decoder(plain.sdpa), (random_ids(1, 4).float(), random_ids(1, 4)), "must be int64"),
    ],
    ids=["other inputs", "one input", "no module", "no pair", "shapes", "dtype"],
)
def test_bad_input(model: object, inputs: object, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        capture_module(model, inputs)


def test_a_transformed_module_is_not_transformed_again() -> None:
    llm = transform(decoder(plain.sdpa), Budgets.full(2, 20))
    with pytest.raises(UnsupportedModelError, match="transformed already"):
        transform(llm, Budgets.full(2, 20))


def test_a_transformed_module_is_not_moved_or_cast() -> None:
    _, llm = full(next(iter(MODELS)))
    with pytest.raises(BackendError, match="move or cast the model, then transform it"):
        llm.half()


def test_weights_are_shared_and_other_plans_need_no_capture() -> None:
    model = decoder(plain.sdpa)
    llm = transform(model, Budgets.full(2, 40))
    captured = {tensor.data_ptr() for tensor in llm.prefill.state_dict().values()}
    assert {parameter.data_ptr() for parameter in model.parameters()} == captured
    tight = llm.with_budgets(Budgets((8, 12)))
    assert tight.program.graphs.captured is llm.program.graphs.captured
    assert tight.kv_bytes == 20 * 2 * HEADS * HEAD_DIM * 4
    assert "2 layers" in tight.describe()


def test_generate() -> None:
    model = decoder(plain.sdpa).eval()
    llm = transform(model, Budgets.full(2, 60), rows=2)
    ids = random_ids(2, 9)
    expected, _ = plain.greedy_by_recomputing(model, ids, 12)

    padded = torch.cat((torch.zeros(2, 3, dtype=torch.int64), ids), 1)
    mask = torch.tensor([[0] * 3 + [1] * 9] * 2)
    assert torch.equal(llm.generate(padded, 12, attention_mask=mask)[:, 3:], expected)

    end = int(expected[0, 12])
    ended = llm.generate(ids, 12, eos_token_id=end)
    over = ended[0, 9:].tolist().index(end) + 9
    assert torch.equal(ended[0, : over + 1], expected[0, : over + 1])
    assert (ended[0, over:] == end).all()

    draws = [llm.generate(ids, 12, do_sample=True, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(llm.generate(ids, 12, do_sample=True, top_k=1), expected)

    session = llm.new_session()
    first = llm.generate(ids, 4, session=session)
    more = llm.generate(first[:, -1:], 8, session=session)
    assert torch.equal(torch.cat((first, more[:, 1:]), 1), expected)
    torch.testing.assert_close(llm(ids), model(ids, torch.arange(9).expand(2, -1)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_a_layer_that_attends_twice(shared: bool) -> None:
    """Over the same keys and values with other queries, which share a cache; or over others, which have their own."""
    model = Decoder(lambda: plain.AttendsTwice(shared)).eval()
    caches = 2 if shared else 4
    llm = transform(model, Budgets.full(caches, 40))
    ids = random_ids(1, 20)
    expected, _ = plain.greedy_by_recomputing(model, ids, 8)
    assert torch.equal(llm.generate(ids, 8), expected)
    assert llm.kv_bytes == caches * 40 * 2 * HEADS * HEAD_DIM * 4


def test_what_generate_refuses() -> None:
    llm = transform(decoder(plain.sdpa), Budgets.full(2, 12))
    other = transform(decoder(plain.sdpa), Budgets.full(2, 12))
    ids = random_ids(1, 5)
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2, "do_sample": True, "temperature": 0.0}, "temperature"),
        ({"max_new_tokens": 2, "top_k": 0}, "top_k"),
        ({"max_new_tokens": 2, "eos_token_id": -1}, "tokens that end a row"),
        ({"max_new_tokens": 2, "attention_mask": torch.zeros(1, 5)}, "nothing but padding"),
    ):
        with pytest.raises(PromptError, match=message):
            llm.generate(ids, **options)
    with pytest.raises(SessionError, match="another transformed model"):
        llm.generate(ids, 2, session=other.new_session())
    with pytest.raises(CapacityError, match="13 tokens do not fit"):
        llm.generate(ids, 20)
    with pytest.raises(PromptError, match=f"more than the model's {POSITIONS} positions"):
        llm.with_budgets(Budgets((8, 8))).generate(random_ids(1, 90), 20)


def test_inductor() -> None:
    model = decoder(plain.sdpa_alibi, kv_heads=2).eval()
    ids = random_ids(1, 20)
    expected, _ = plain.greedy_by_recomputing(model, ids, 8)
    assert torch.equal(transform(model, Budgets.full(2, 40), backend="inductor").generate(ids, 8), expected)
