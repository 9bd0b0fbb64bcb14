"""Reading facts off a transformers model without changing it."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from xkv_fx.errors import UnsupportedModelError

# What does not change which plan is right for a model.
_VOLATILE = {
    "_name_or_path",
    "_attn_implementation",
    "_commit_hash",
    "attn_implementation",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}

_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def check_model(model: Any) -> PreTrainedModel:
    """`model`, or the model inside it that holds peft adapters, if it is a decoder-only causal language model.

    Raises:
        UnsupportedModelError: it is something else, is spread over devices, or rotates by angles that change with the
            length; the message says what.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a model, got {type(model).__name__}; load it first")
    model = _adapted_model(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model; its attention cannot be captured"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder model; only decoders are supported")
    _check_state(model)
    _check_placement(model)
    _check_rotary_embedding(model)
    return model


def _adapted_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft model, adapter layers and all; any other model itself."""
    adapters = getattr(model, "peft_config", None)
    if not isinstance(adapters, dict) or isinstance(model, PreTrainedModel):
        return model
    prompts = [name for name, adapter in adapters.items() if adapter.is_prompt_learning]
    if prompts:
        raise UnsupportedModelError(
            f"the adapter {prompts[0]!r} of {type(model).__name__} adds tokens of its own to every prompt, outside the "
            "model's layers; only adapters inside the layers, such as LoRA, can be captured"
        )
    inner: nn.Module = model.get_base_model()  # type: ignore[operator]
    return inner


def _check_state(model: PreTrainedModel) -> None:
    """A cache of keys and values is all that is kept of earlier tokens."""
    name = type(model).__name__
    for path, module in model.named_modules():
        if "indexer" in type(module).__name__.lower():
            raise UnsupportedModelError(
                f"{name} cannot be captured: {path} ({type(module).__name__}) picks the keys of each query by what the "
                "tokens are, from keys of its own that it keeps for all of them"
            )
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    others = sorted({kind for kind in kinds if kind not in _ATTENTION_KINDS})
    if getattr(model, "_is_stateful", False) and (others or not kinds):
        raise UnsupportedModelError(
            f"{name} keeps another state than keys and values ({', '.join(others) or 'recurrent'}), which a KV cache "
            "plan does not carry along; recurrent and hybrid models are not supported"
        )


def _check_placement(model: PreTrainedModel) -> None:
    """A graph lives on one device, and a hook of accelerate would run the user's own modules instead of our copy."""
    name = type(model).__name__
    hooked = [path or "the model itself" for path, module in model.named_modules() if hasattr(module, "_hf_hook")]
    if hooked:
        raise UnsupportedModelError(
            f"{name} cannot be captured: accelerate moves the inputs or weights of {hooked[0]} while it runs "
            "(device_map, offloading); load the model whole on one device, without a device_map"
        )
    devices = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
    if "meta" in devices:
        raise UnsupportedModelError(
            f"{name} cannot be captured: it has weights on the meta device, which hold no numbers; load it first"
        )
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"{name} cannot be captured: its weights are on {' and '.join(devices)}; move the whole model to one device"
        )


def _check_rotary_embedding(model: PreTrainedModel) -> None:
    """Keys are kept as they were rotated, and a kept one cannot be rotated again when the angles change."""
    for path, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                raise UnsupportedModelError(
                    f"{type(model).__name__} cannot be captured: {path} is a rotary embedding of type {kind!r}, whose "
                    "angles change with the length; keys that are kept would need other angles later. Types such as "
                    "'yarn', 'linear' and 'llama3' are supported"
                )


def fingerprint(model: PreTrainedModel) -> str:
    """Identifies a model by class and configuration; the same for every dtype and quantization of it."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE}
    text = json.dumps(config, sort_keys=True, default=str)
    digest = hashlib.sha256(f"{type(model).__name__} {text}".encode()).hexdigest()
    return f"{type(model).__name__}:{digest[:16]}"


def has_latents(model: PreTrainedModel) -> bool:
    """Whether the model makes keys and values from latents (multi-head latent attention), which may be cached then."""
    return isinstance(getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None), int)


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence the model has positions for. Attention in chunks (Llama 4) is plain causal attention within
    the first chunk, and ends there."""
    config = model.config.get_text_config(decoder=True)
    chunk = getattr(config, "attention_chunk_size", None)
    if isinstance(chunk, int) and "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return chunk
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def shadow(model: PreTrainedModel, attention: str | None) -> PreTrainedModel:
    """A copy of the modules of `model`, in evaluation mode, on the very same weights, with its own configuration.

    Args:
        attention: the implementation of attention to use; the model's own when None.

    The user's model is not touched.
    """
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, weights)
    twin.eval()
    if attention is None:
        return twin
    try:
        twin.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not let its attention be replaced ({error}); it cannot be captured"
        ) from error
    return twin
