"""A public call reads a model once, copies it once, and traces of it only what its graph needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import POSITIONS, llama, random_ids
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, find_packed_sequence_indices

import xkv_fx
from xkv_fx import Budgets, UnsupportedModelError
from xkv_fx.hf.attention_entry import CAPTURED_NAME, NAME
from xkv_fx.hf.capture import capture, layers_of_model, layers_of_source
from xkv_fx.hf.inspect import read_model

CALLS: dict[str, Callable[[Any], Any]] = {
    "capture": capture,
    "layers": layers_of_model,
    "transform": lambda model: xkv_fx.transform(model, Budgets.full(2, 60), backend="eager"),
    "Cache": lambda model: xkv_fx.Cache(model, Budgets.full(2, 60)),
    "profile": lambda model: xkv_fx.profile(model, [random_ids(1, 30)]),
}


class Counted:
    """A function that counts its calls."""

    def __init__(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        module, _, name = place.rpartition(".")
        self.function = getattr(__import__(module, fromlist=[name]), name)
        self.calls = 0
        monkeypatch.setattr(place, self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.function(*args, **options)


@pytest.mark.parametrize("call", CALLS)
def test_a_model_is_read_once_and_copied_once(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    inspect, copies = "xkv_fx.hf.inspect", Counted("xkv_fx.hf.capture.shadow", monkeypatch)
    read = [Counted(f"{inspect}.{name}", monkeypatch) for name in ("changing_rotary", "shard_of", "fingerprint")]
    CALLS[call](model)
    assert [counted.calls for counted in (*read, copies)] == [1, 1, 1, 1]


def bloom() -> PreTrainedModel:
    """Its attention is written out."""
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)).eval()


def test_written_out_attention_takes_a_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has lost the attention that the model came with."""
    copies = Counted("xkv_fx.hf.capture.shadow", monkeypatch)
    layers_of_model(bloom())
    assert copies.calls == 2


def test_what_is_read() -> None:
    source, facts = read_model(llama(3))
    assert facts.name == "LlamaForCausalLM"
    assert (facts.dtype, facts.device) == (torch.float32, torch.device("cpu"))
    assert (facts.max_positions, facts.ends_early) == (POSITIONS, "")
    assert (facts.hidden_layers, facts.rotary, facts.has_latents) == (3, (), False)
    assert capture(source, check=False, decode=False).facts == facts


def test_no_masks_are_made_while_a_model_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are looked at before, and each would be traced and thrown away."""
    exporting = []

    def noted(position_ids: Tensor) -> Tensor | None:
        exporting.append(torch.compiler.is_exporting())
        return find_packed_sequence_indices(position_ids)

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", noted)
    capture(llama())
    assert exporting, "the masks were not looked at"
    assert not any(exporting)


def test_the_attention_of_capture_runs_nowhere_else() -> None:
    """It sees no masks, and would take padding for tokens."""
    assert NAME in ALL_MASK_ATTENTION_FUNCTIONS
    assert CAPTURED_NAME not in ALL_MASK_ATTENTION_FUNCTIONS
    model = llama()
    model.set_attn_implementation(CAPTURED_NAME)
    with pytest.raises(UnsupportedModelError, match="LlamaAttention runs under the attention 'xkv_captured'"):
        model(random_ids(1, 9), use_cache=False)


class Switching(nn.Module):
    """A part of a model that computes with gradients, whatever it is called with."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> Any:
        with torch.enable_grad():
            return self.inner(*args, **options)


@pytest.mark.parametrize("part", ["self_attn", "mlp"])
def test_switches_of_gradients_leave_no_trace(part: str) -> None:
    model = llama()
    layer = model.get_submodule("model.layers.1")
    setattr(layer, part, Switching(layer.get_submodule(part)))
    llm = xkv_fx.transform(model, Budgets.full(2, 60), backend="eager")
    ids, options = random_ids(1, 20), {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(llm.generate(ids, **options), model.generate(ids, **options))
    assert not [node for node in llm.prefill.graph.nodes if "grad" in str(node.target)]


def test_a_model_that_does_not_say_how_many_layers_it_has() -> None:
    """Those that hold another state than keys and values would not be missed."""
    source, facts = read_model(llama())
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: its configuration has no num_hidden_layers"):
        layers_of_source(source, dataclasses.replace(facts, hidden_layers=None))
