"""What is read off a model before anything is done with it: where it lives, and how it rotates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import Snapshot, build, gemma3, llama, random_ids
from transformers import Llama4ForCausalLM, Llama4TextConfig, Phi3Config, Phi3ForCausalLM

import xkv_fx
from xkv_fx import Budgets, UnsupportedModelError
from xkv_fx.errors import PromptError
from xkv_fx.hf.capture import capture, layers_of_model

ROPE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 40},
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
    },
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 40,
    },
}


def rope(kind: str) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **ROPE[kind]}


def rotating(kind: str) -> Any:
    return llama(2, rope_parameters=rope(kind), max_position_embeddings=80)


def phi3() -> Any:
    config = Phi3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=80,
        original_max_position_embeddings=40,
        pad_token_id=0,
        rope_parameters=rope("longrope"),
    )
    return build(Phi3ForCausalLM, config)


def gemma3_of_two_kinds() -> Any:
    """One rotary embedding for two kinds of layers, of which one changes with the length."""
    default = {"rope_type": "default", "rope_theta": 10000.0}
    angles = {"sliding_attention": default, "full_attention": rope("dynamic")}
    return gemma3(rope_parameters=angles, max_position_embeddings=40)


def changing_anywhere() -> Any:
    model = llama(2, rope_parameters=rope("dynamic"))
    del model.model.rotary_emb.original_max_seq_len
    return model


def with_hooks(model: Any) -> Any:
    """A model as accelerate dispatches it: each hooked module's forward is another one's."""
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.get_submodule("model.layers.1"), hooks.AlignDevicesHook(execution_device="cpu"))
    return model


def offloaded(model: Any) -> Any:
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")
    return model


def half_loaded(model: Any, part: str) -> Any:
    model.get_submodule(part).to("meta")
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "angles that change nobody knows where": (
        changing_anywhere,
        "LlamaForCausalLM cannot be captured: model.rotary_emb is a rotary embedding of type 'dynamic', whose angles",
    ),
    "hooks": (
        lambda: with_hooks(llama(2)),
        "LlamaForCausalLM cannot be captured: accelerate moves the inputs or weights of model.layers.1 while it runs",
    ),
    "offloaded": (lambda: offloaded(llama(2)), "load the model whole on one device, without a device_map"),
    "meta but for the head": (
        lambda: half_loaded(llama(2), "model"),
        "LlamaForCausalLM cannot be captured: it has weights on the meta device",
    ),
    "head on meta": (lambda: half_loaded(llama(2), "lm_head"), "it has weights on the meta device"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_models_are_refused_by_what_they_are(case: str) -> None:
    make, message = REFUSED[case]
    model = make()
    for attempt in (
        lambda: capture(model, decode=False),
        lambda: layers_of_model(model),
        lambda: xkv_fx.transform(model, Budgets.full(2, 60), backend="eager"),
        lambda: xkv_fx.profile(model, [random_ids(1, 9)]),
        lambda: Budgets.full(2, 60).kv_bytes(model),
    ):
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            attempt()
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaled_rotary_embeddings_generate_as_transformers_does(kind: str) -> None:
    """Below and beyond the length that the angles were scaled from."""
    model = rotating(kind)
    llm = xkv_fx.transform(model, Budgets.full(2, 80), backend="eager")
    for length in (10, 30, 60):
        ids, options = random_ids(1, length, seed=length), {"max_new_tokens": 20, "do_sample": False}
        assert torch.equal(llm.generate(ids, **options), model.generate(ids, **options))


CHANGING: dict[str, Callable[[], Any]] = {
    "longrope": phi3,
    "dynamic in some layers": gemma3_of_two_kinds,
}


@pytest.mark.parametrize("case", CHANGING)
def test_angles_that_change_with_the_length_are_taken_as_long_as_they_do_not(case: str) -> None:
    """Up to 40 positions, also when the model has just run on more and its angles are others now."""
    model = CHANGING[case]()
    with torch.no_grad():
        model(random_ids(1, 60))
    before = Snapshot.of(model)
    llm = xkv_fx.transform(model, Budgets.full(2, 40), backend="eager")
    before.assert_unchanged()
    ids, options = random_ids(1, 24), {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(llm.generate(ids, **options), model.generate(ids, **options))
    with pytest.raises(PromptError, match="41 tokens are more than the model's 40 positions"):
        llm.generate(random_ids(1, 41), max_new_tokens=1)
    with pytest.raises(UnsupportedModelError, match="angles change with the length"):
        xkv_fx.Cache(model, Budgets.full(2, 40))
    if case == "longrope":  # the model has 80 positions
        with pytest.raises(UnsupportedModelError, match=r"for 40 positions, behind which the angles .* for 60 tokens"):
            llm.with_budgets(Budgets.full(2, 60))


def test_a_plan_for_more_than_a_chunk_of_attention_is_refused() -> None:
    """Llama 4 is taken as long as its local attention is plain causal attention."""
    config = Llama4TextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=80, moe_layers=[],
        attention_chunk_size=32, layer_types=["chunked_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    model = build(Llama4ForCausalLM, config)
    llm = xkv_fx.transform(model, Budgets.uniform(2, 16), backend="eager")
    with pytest.raises(UnsupportedModelError, match="for 32 positions, behind which some layers attend in chunks"):
        llm.with_budgets(Budgets.full(2, 33))
    assert "up to 32 positions, behind which some layers attend in chunks" in llm.describe()
    with pytest.raises(PromptError, match="33 tokens are more than the model's 32 positions"):
        llm.generate(random_ids(1, 33), max_new_tokens=1)
