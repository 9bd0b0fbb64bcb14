"""Capture: one node a layer, the model's own logits at every length, the model left as it was; or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ready_models import captured, model
from tiny_models import POSITIONS, VOCABULARY, Snapshot, build, gemma3, llama, random_ids
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DogeConfig,
    DogeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import UnsupportedModelError
from xkv_fx.hf.capture import capture, layers_of_model
from xkv_fx.hf.inspect import fingerprint
from xkv_fx.layers import LayerSpec
from xkv_fx.passes.tools.graph import calls, placeholders

attention = torch.ops.xkv.attention.default
SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 96}


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids).contiguous()


def logits_of(source: nn.Module, ids: Tensor, at: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        logits: Tensor = source(ids, position_ids=positions(ids) if at is None else at, use_cache=False).logits
    return logits


def test_facts() -> None:
    facts = captured()
    assert facts.layers == (LayerSpec(query_heads=4, kv_heads=2, key_dim=8, value_dim=8, itemsize=4),) * 3
    assert (facts.rows, facts.vocabulary, facts.max_positions) == (2, VOCABULARY, POSITIONS)
    assert (facts.dtype, facts.device) == (torch.float32, torch.device("cpu"))
    assert facts.fingerprint == fingerprint(model("llama", 3))


@pytest.mark.parametrize("kind", ["prompt", "token"])
def test_one_attention_a_layer_with_its_layers_number(kind: Any) -> None:
    module = captured().graph(kind)
    assert [node.args[3] for node in calls(module, attention)] == [0, 1, 2]
    assert list(placeholders(module.graph)) == ["input_ids", "position_ids"]
    for node in calls(module, attention):
        q, k, v = (argument.meta["val"] for argument in node.args[:3])  # type: ignore[union-attr]
        assert (q.shape[1], k.shape[1], v.shape[1]) == (4, 2, 2), "K/V are not repeated"


@pytest.mark.parametrize("length", [2, 3, 23, 24, 25, POSITIONS])
def test_the_prompt_graph_computes_the_models_logits_at_every_length(length: int) -> None:
    ids = random_ids(2, length)
    with torch.no_grad():
        logits = captured().prompt(ids, positions(ids))
    torch.testing.assert_close(logits, logits_of(model("llama", 3), ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("place", [0, 7, POSITIONS - 1])
def test_the_token_graph_computes_one_token_at_every_position(place: int) -> None:
    token, at = random_ids(2, 1), torch.full((2, 1), place)
    graph = captured().token
    assert graph is not None
    with torch.no_grad():
        logits = graph(token, at)
    torch.testing.assert_close(logits, logits_of(model("llama", 3), token, at), atol=1e-4, rtol=0)


def test_no_mask_is_in_the_graph() -> None:
    for node in captured().prompt.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            sizes = [size for size in value.shape if isinstance(size, torch.SymInt)]
            assert len(sizes) <= 1, node.format_node()


def test_layers_are_read_without_capturing() -> None:
    source = model("llama", 3)
    snapshot = Snapshot.of(source)
    assert layers_of_model(source) == captured().layers
    snapshot.assert_unchanged()


def test_weights_are_the_models_own_tensors() -> None:
    source, found = model("llama", 3), captured()
    own = {id(tensor) for tensor in (*source.parameters(), *source.buffers())}
    for graph in (found.prompt, found.token):
        assert graph is not None
        assert {id(tensor) for tensor in (*graph.parameters(), *graph.buffers())} <= own


def test_the_model_is_left_as_it_was_also_in_training() -> None:
    """With dropout in training, capture must look at evaluation mode without switching the model to it."""
    source = llama(2, attention_dropout=0.5).train()
    source.lm_head.eval()
    source.requires_grad_(False)
    source.model.norm.weight.requires_grad_(True)
    snapshot = Snapshot.of(source)
    grads = [parameter.requires_grad for parameter in source.parameters()]
    random_state = torch.random.get_rng_state()
    found = capture(source, decode=False)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    snapshot.assert_unchanged()
    assert [parameter.requires_grad for parameter in source.parameters()] == grads
    ids = random_ids(1, 30)
    with torch.no_grad():
        logits = found.prompt(ids, positions(ids))
    torch.testing.assert_close(logits, logits_of(source.eval(), ids), atol=1e-4, rtol=0)


def test_a_model_of_few_positions() -> None:
    source = llama(1, max_position_embeddings=16)
    found = capture(source, decode=False)
    ids = random_ids(1, 16)
    with torch.no_grad():
        logits = found.prompt(ids, positions(ids))
    torch.testing.assert_close(logits, logits_of(source, ids), atol=1e-4, rtol=0)


def test_half_precision() -> None:
    source = llama(1).to(torch.bfloat16)
    found = capture(source, decode=False)
    assert found.dtype == torch.bfloat16
    assert found.layers[0].itemsize == 2


def test_positions_from_embeddings() -> None:
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=96)
    found = capture(build(GPT2LMHeadModel, config), decode=False)
    assert found.layers == (LayerSpec(query_heads=4, kv_heads=4, key_dim=8, value_dim=8, itemsize=4),) * 2
    assert found.max_positions == 96


def test_fingerprint_tells_models_apart_but_not_dtypes() -> None:
    assert fingerprint(llama(2)) == fingerprint(llama(2, seed=5)) == fingerprint(llama(2).to(torch.float16))
    assert len({fingerprint(llama(layers)) for layers in (2, 3)} | {fingerprint(llama(2, rms_norm_eps=1e-3))}) == 3


# Refusals


class MaskingLlama(LlamaForCausalLM):
    """Gives its attention a mask of its own, whatever the attention interface says."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers[1].self_attn.register_forward_pre_hook(self._mask, with_kwargs=True)

    @staticmethod
    def _mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        length = kwargs["hidden_states"].shape[1]
        return args, {**kwargs, "attention_mask": torch.zeros(1, 1, length, length)}


class BiasedLlama(LlamaForCausalLM):
    """Gives its attention something that this version does not know."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "slopes": torch.ones(4)}), with_kwargs=True
            )


class TwoFacedLlama(LlamaForCausalLM):
    """Computes something else once its attention is replaced."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if not str(self.config._attn_implementation).startswith("xkv"):  # the name is another while it is exported
            output.logits = output.logits + 0.1 * output.logits.abs().max()
        return output


class BranchingLlama(LlamaForCausalLM):
    """Its forward depends on what the tokens are, which no graph can hold."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        if int(input_ids.sum()) > 10:
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        return super().forward(input_ids=input_ids, **kwargs)


def non_causal() -> LlamaForCausalLM:
    source = llama(2)
    source.model.layers[1].self_attn.is_causal = False
    return source


def unnumbered() -> LlamaForCausalLM:
    source = llama(2)
    del source.model.layers[1].self_attn.layer_idx
    return source


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder-decoder": (
        lambda: build(T5ForConditionalGeneration, T5Config(vocab_size=61, d_model=32, num_layers=1, d_ff=8, d_kv=8)),
        "T5ForConditionalGeneration is an encoder-decoder model",
    ),
    "Mamba": (
        lambda: build(MambaForCausalLM, MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2)),
        "MambaForCausalLM has no attention: .* there is nothing to budget",
    ),
    "convolutions alone": (
        lambda: build(Lfm2ForCausalLM, Lfm2Config(**LLAMA, layer_types=["conv", "conv"])),
        "Lfm2ForCausalLM has no attention: .* there is nothing to budget",
    ),
    "bidirectional": (
        lambda: build(BertLMHeadModel, BertConfig(**SIZES, intermediate_size=48)),
        "BertSelfAttention does not attend causally",
    ),
    "bidirectional by configuration": (
        lambda: gemma3(use_bidirectional_attention=True),
        "Gemma3Attention does not attend causally",
    ),
    "bidirectional in one layer": (non_causal, "LlamaAttention does not attend causally"),
    "a mask of its own": (
        lambda: build(DogeForCausalLM, DogeConfig(**LLAMA)),
        "DogeAttention adds a mask of its own",
    ),
    "a mask by a hook": (
        lambda: build(MaskingLlama, LlamaConfig(**LLAMA)),
        "LlamaAttention adds a mask of its own",
    ),
    "an unknown argument": (
        lambda: build(BiasedLlama, LlamaConfig(**LLAMA)),
        "LlamaAttention gives its attention slopes, which this version cannot carry over",
    ),
    "a branch on the tokens": (
        lambda: build(BranchingLlama, LlamaConfig(**LLAMA)),
        "BranchingLlama cannot be captured",
    ),
    "without logits": (lambda: build(LlamaModel, LlamaConfig(**LLAMA)), "LlamaModel cannot be captured"),
    "without a layer's number": (unnumbered, "LlamaAttention has no layer_idx"),
    "other logits than the model's": (
        lambda: build(TwoFacedLlama, LlamaConfig(**LLAMA)),
        "TwoFacedLlama: the captured graph differs from the model by .* of its largest logit",
    ),
    "something else, its attention ours already": (
        lambda: build(TwoFacedLlama, LlamaConfig(**LLAMA, attn_implementation="xkv")),
        "TwoFacedLlama: the captured graph differs from the model by .* of its largest logit",
    ),
    "on the meta device": (lambda: llama(1).to("meta"), "LlamaForCausalLM cannot be captured"),
    "a classifier": (
        lambda: build(LlamaForSequenceClassification, LlamaConfig(**LLAMA, pad_token_id=0)),
        "LlamaForSequenceClassification",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_captured_exactly_is_refused_by_name_and_left_as_it_was(case: str) -> None:
    make, message = REFUSED[case]
    source = make()
    on_meta = source.device.type == "meta"
    snapshot = None if on_meta else Snapshot.of(source)
    with pytest.raises(UnsupportedModelError, match=message):
        capture(source, decode=False)
    if snapshot is not None:
        snapshot.assert_unchanged()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (None, "expected a model, got NoneType; load it first"),
        ("a-model", "expected a model, got str"),
        (LlamaConfig(), "expected a model, got LlamaConfig"),
        (LlamaForCausalLM, "expected a model, got type"),
        (
            nn.Linear(2, 2),
            "Linear is not a transformers model; a plain module of .input_ids, position_ids. is given to tra",
        ),
    ],
    ids=["None", "str", "configuration", "class", "module"],
)
@pytest.mark.parametrize("ask", [capture, layers_of_model])
def test_what_is_no_transformers_model_is_refused(ask: Callable[[Any], CapturedModel], what: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        ask(what)


def test_a_refusal_gives_the_reason_of_the_failure_it_comes_from() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        capture(build(BranchingLlama, LlamaConfig(**LLAMA)))
    assert caught.value.__cause__ is not None
    assert len(str(caught.value).splitlines()) == 1


def test_unchecked_capture_does_not_compare_logits() -> None:
    found = capture(build(TwoFacedLlama, LlamaConfig(**LLAMA)), check=False, decode=False)
    assert found.token is None
