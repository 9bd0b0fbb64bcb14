"""Reading facts off a transformers model without changing it."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.hf.rotary import changing_rotary, check_rotary, fixed_up_to

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
            length in ways that are not known; the message says what.
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
    check_rotary(model)
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
    """The longest sequence that the model is taken for: what it has positions for, or less (`ends_early`)."""
    return min(
        (limit for limit, _ in (*_early_ends(model), (_positions(model), "")) if limit is not None), default=None
    )


def ends_early(model: PreTrainedModel) -> str:
    """Why a model is taken for fewer positions than it has, as what is different behind them; empty where it is not."""
    limit = max_positions(model)
    return "; ".join(why for end, why in _early_ends(model) if end == limit != _positions(model))


def _early_ends(model: PreTrainedModel) -> list[tuple[int, str]]:
    ends = []
    config = model.config.get_text_config(decoder=True)
    chunk = getattr(config, "attention_chunk_size", None)
    if isinstance(chunk, int) and "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        # within the first chunk, attention in chunks is plain causal attention
        ends.append((chunk, "some layers attend in chunks of that size (Llama 4), a new one of which begins there"))
    fixed = fixed_up_to(model)
    if fixed is not None:
        ends.append((fixed, "the angles of its rotary embedding change, those of kept keys too"))
    return ends


def _positions(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def shadow(model: PreTrainedModel, attention: str | None, settled: bool = True) -> PreTrainedModel:
    """A copy of the modules of `model`, in evaluation mode, on the very same weights, with its own configuration.

    Args:
        attention: the implementation of attention to use; the model's own when None.
        settled: fix angles that would change with the length.

    The user's model is not touched.
    """
    own = {id(buffer) for rotary in changing_rotary(model) for buffer in rotary.buffers}
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own}
    twin = copy.deepcopy(model, weights)
    twin.eval()
    for rotary in changing_rotary(twin) if settled else ():
        rotary.settle()
    if attention is None:
        return twin
    try:
        twin.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not let its attention be replaced ({error}); it cannot be captured"
        ) from error
    return twin
