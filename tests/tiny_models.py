"""Tiny transformers models with random weights, built from configurations; nothing is downloaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 61
POSITIONS = 400
WINDOW = 8
"""The sliding window of those models that have one."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def llama(layers: int = 2, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """GQA with two KV heads; the model of most tests."""
    return build(LlamaForCausalLM, LlamaConfig(**{**SIZES, "num_hidden_layers": layers, **options}), seed)


def qwen2(layers: int = 2, seed: int = 0, **options: Any) -> Qwen2ForCausalLM:
    """Biases in the projections of queries, keys and values."""
    return build(Qwen2ForCausalLM, Qwen2Config(**{**SIZES, "num_hidden_layers": layers, **options}), seed)


def qwen3(layers: int = 2, seed: int = 0, **options: Any) -> Qwen3ForCausalLM:
    """Queries and keys are normalised."""
    return build(Qwen3ForCausalLM, Qwen3Config(**{**SIZES, "num_hidden_layers": layers, **options}), seed)


def mistral(layers: int = 2, seed: int = 0, **options: Any) -> MistralForCausalLM:
    """A sliding window in every layer."""
    sizes = {**SIZES, "num_hidden_layers": layers, "sliding_window": WINDOW}
    return build(MistralForCausalLM, MistralConfig(**{**sizes, **options}), seed)


def gemma2(layers: int = 2, seed: int = 0, **options: Any) -> Gemma2ForCausalLM:
    """Soft-capped logits; every other layer has a sliding window. Eager attention: the others leave the cap out."""
    sizes = {**SIZES, "num_hidden_layers": layers, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
    config = Gemma2Config(**{**sizes, "attn_logit_softcapping": 2.0, "attn_implementation": "eager", **options})
    return build(Gemma2ForCausalLM, config, seed)


def gemma3(layers: int = 2, seed: int = 0, **options: Any) -> Gemma3ForCausalLM:
    """Sliding layers and full ones, which rotate by different angles."""
    sizes = {**SIZES, "num_hidden_layers": layers, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
    kinds = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]
    return build(Gemma3ForCausalLM, Gemma3TextConfig(**{**sizes, "layer_types": kinds, **options}), seed)


def gpt_oss(layers: int = 2, seed: int = 0, **options: Any) -> GptOssForCausalLM:
    """A learned sink a head, sliding windows, and a mixture of experts."""
    sizes = {**SIZES, "num_hidden_layers": layers, "sliding_window": WINDOW}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "attn_implementation": "eager"}
    return build(GptOssForCausalLM, GptOssConfig(**{**sizes, **experts, **options}), seed)


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt_oss": gpt_oss,
}


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Token ids int64 `[rows, length]`, none of them padding, start or end."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a model was before something was done with it."""

    model: PreTrainedModel
    tensors: dict[str, Tensor]
    values: dict[str, Tensor]
    config: dict[str, Any]
    attention: str
    modes: tuple[bool, ...]
    hooks: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Snapshot:
        tensors = _tensors(model)
        return cls(
            model=model,
            tensors=tensors,
            values={name: tensor.detach().clone() for name, tensor in tensors.items()},
            config=model.config.to_dict(),
            attention=model.config._attn_implementation,
            modes=tuple(module.training for module in model.modules()),
            hooks=_hooks(model),
        )

    def assert_unchanged(self) -> None:
        """The very same tensors with the same values, configuration, modes of training and number of hooks."""
        now = _tensors(self.model)
        assert now.keys() == self.tensors.keys()
        for name, tensor in now.items():
            assert tensor is self.tensors[name], f"{name} is another tensor"
            assert torch.equal(tensor, self.values[name]), f"{name} has other values"
        assert self.model.config.to_dict() == self.config
        assert self.model.config._attn_implementation == self.attention
        assert tuple(module.training for module in self.model.modules()) == self.modes
        assert _hooks(self.model) == self.hooks


def build(kind: type[Any], config: Any, seed: int = 0) -> Any:
    """A model in evaluation mode. Its weights are large enough for attention to differ much between tokens."""
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.1
            centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    return model


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _hooks(model: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
