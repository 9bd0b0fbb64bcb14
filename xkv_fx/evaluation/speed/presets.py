"""Models of real shapes with random weights, for figures that do not depend on what a model has learned."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from xkv_fx.errors import UnsupportedModelError

_SHARED: dict[str, Any] = {"num_key_value_heads": 8, "head_dim": 128, "hidden_size": 4096, "num_attention_heads": 32}


def _llama_8b() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=128_256, intermediate_size=14_336, num_hidden_layers=32, max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, tie_word_embeddings=False, **_SHARED,
    )  # fmt: skip


def _qwen3_8b() -> PreTrainedConfig:
    return Qwen3Config(
        vocab_size=151_936, intermediate_size=12_288, num_hidden_layers=36, max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, tie_word_embeddings=False, **_SHARED,
    )  # fmt: skip


def _tiny() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip


PRESETS = {"llama-3.1-8b": _llama_8b, "qwen3-8b": _qwen3_8b, "tiny": _tiny}


def random_model(preset: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of that shape, made where it will run.

    Raises:
        UnsupportedModelError: no such preset.
    """
    if preset not in PRESETS:
        raise UnsupportedModelError(f"there is no preset {preset!r}; choose one of {', '.join(PRESETS)}")
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(PRESETS[preset](), dtype=dtype)
    shaped: PreTrainedModel = model.eval()
    return shaped
