"""Tiny models with random weights, one for every causal language model that transformers registers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 64
POSITIONS = 256
SLIDING_WINDOW = 8
CHUNK = 128

# Sizes by the names that configurations use; a name counts where a configuration has it and its default is a number.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("input_embedding_size", "embedding_dim", "attention_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("backbone_hidden_size", "hidden_size_global", "input_size", "out_hidden_size"), 32),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size"), 32),
    **dict.fromkeys(("output_embedding_size", "d_ff", "dff", "dim_ff", "d_inner", "ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "feed_forward_size", "mlp_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth", "max_window_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "attention_heads", "linear_num_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "dim_head", "d_head", "kv_channels", "swa_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("attention_head_dim", "attention_head_size", "global_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "o_lora_rank", "query_pre_attn_scalar"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "zero_expert_num"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), POSITIONS),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "model_max_length"), POSITIONS),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention", "window_size"), SLIDING_WINDOW),
    **dict.fromkeys(("attention_window_size", "local_attention_window_len"), SLIDING_WINDOW),
    "attention_chunk_size": CHUNK,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
    "index_n_heads": 16,  # with few, products that are all negative make scores tie
    "index_topk": 16,
}
_EVEN_IF_UNSET = {"num_key_value_heads", "head_dim"}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types")
_FLAGS = {"is_decoder": True}

# What a family needs besides, or instead; a dictionary is for a nested configuration.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
_COMPASS_ROPE = {
    kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 32,
    "indexer_compress_ratio": 2,
}
_NO_LAYER_INPUTS = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 2,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "axk2": {"q_lora_rank": 16},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": _COMPASS_ROPE,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
    },
    "gemma4_assistant": {"text_config": _NO_LAYER_INPUTS},
    "gemma4_unified_assistant": {"text_config": _NO_LAYER_INPUTS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 16},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (16, 16), "is_decoder": True},
    "roc_bert": {
        "pronunciation_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 8,
        "shape_embed_dim": 8,
    },
    "xlstm": {"num_blocks": 2, "num_hidden_layers": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
    },
    "zamba2": {"num_hidden_layers": 4, "hybrid_layer_ids": [1, 3], "layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclasses.dataclass(frozen=True)
class Registered:
    """One entry of transformers' registry of causal language models."""

    model_type: str
    class_name: str

    @property
    def name(self) -> str:
        """The class, and where several model types share it, the type too."""
        shared = sum(name == self.class_name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) > 1
        return f"{self.class_name} ({self.model_type})" if shared else self.class_name


def registered() -> tuple[Registered, ...]:
    """Every entry of the registry, in its order."""
    return tuple(Registered(kind, name) for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The default configuration of a model type, shrunk: one layer of every kind it has, at least two."""
    return _shrink(CONFIG_MAPPING[model_type], {**_FAMILIES.get(model_type, {}), **overrides})


def tiny_model(entry: Registered, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model in evaluation mode, float32, on CPU; its weights are large enough for attention to be uneven."""
    torch.manual_seed(seed)
    kind = getattr(transformers, entry.class_name)
    config = _of_class(tiny_config(entry.model_type, **overrides), kind.config_class)
    model: PreTrainedModel = kind._from_config(config, attn_implementation="eager")
    model = model.float().eval()
    randomize(model, seed)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
    return model


def tiny_llama() -> LlamaForCausalLM:
    """Two layers without start and end tokens, whose greedy tokens vary; the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Overwrite every parameter: matrices get a spread of 0.3; vectors one of 0.1 around 1 where they were ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.1
            centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))


def _of_class(config: PreTrainedConfig, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The configuration itself, or the nested one that a class of models takes."""
    nested = [value for value in vars(config).values() if isinstance(value, kind)]
    return nested[0] if nested and not isinstance(config, kind) else config


def _shrink(kind: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    own = {name: value for name, value in overrides.items() if not name.endswith("_config")}
    default = _default(kind, overrides)
    fields = {field.name for field in dataclasses.fields(kind)}
    chosen: dict[str, Any] = {}
    for name in fields:
        value = _value(default, name)
        if isinstance(value, PreTrainedConfig):
            chosen[name] = _shrink(type(value), overrides.get(name, {}))
        elif name in _SIZES and (name in _EVEN_IF_UNSET or _is_number(value)):
            chosen[name] = _SIZES[name]
        elif name in _TOKENS:
            chosen[name] = _TOKENS[name]
        elif name in _FLAGS:
            chosen[name] = _FLAGS[name]
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        chosen["num_key_value_heads"] = _SIZES["num_attention_heads"]  # MLA gives every query head keys of its own
    chosen.update(_one_layer_of_each_kind(default, fields))
    chosen.update(own)
    return kind(**chosen)


def _default(kind: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """The defaults; some families have none that are valid without help."""
    try:
        return kind()
    except Exception:  # whatever these families raise; the call below says what is wrong otherwise
        return kind(**overrides)


def _one_layer_of_each_kind(config: PreTrainedConfig, fields: set[str]) -> dict[str, Any]:
    kinds = {
        name: list(dict.fromkeys(value))
        for name in _KINDS
        if name in fields and isinstance(value := _value(config, name), list | tuple) and value
    }
    layers = max([2, *(len(found) for found in kinds.values())])
    chosen: dict[str, Any] = {name: [*found, *found[-1:] * layers][:layers] for name, found in kinds.items()}
    if kinds and "num_hidden_layers" in fields:
        chosen["num_hidden_layers"] = layers
    return chosen


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field, also where it may differ between layers."""
    return vars(config).get(name)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
