"""Reading facts off a transformers model without changing it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from xkv_fx.capture.facts import ModelFacts
from xkv_fx.errors import UnsupportedModelError
from xkv_fx.hf.indexers import picked_by_indexers
from xkv_fx.hf.rotary import ChangingRotary, changing_rotary, fixed_up_to
from xkv_fx.hf.tensor_parallel import shard_of
from xkv_fx.runtime.autocast import refuse_autocast

# Settings that have no effect on which plan suits a model.
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

_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention", "attention"}
_BOTH_KINDS = {"hybrid", "hybrid_sliding"}
"""Layers that attend and keep another state besides."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformersFacts(ModelFacts):
    """What else is known about a transformers model.

    Attributes:
        hidden_layers: how many layers its configuration says that it has; None if it does not say so.
        rotary: the rotary angles that change with the length.
        picked: how many keys its indexers let each query reach; None for a model without indexers.
    """

    hidden_layers: int | None
    rotary: tuple[ChangingRotary, ...]
    picked: int | None


def read_model(model: Any) -> tuple[PreTrainedModel, TransformersFacts]:
    """The model that `check_model` returns, and all that is known about it before it is captured.

    Raises:
        UnsupportedModelError: as `check_model`; or it is split among processes in a way that is not taken.
        BackendError: autocast is on.
    """
    source, rotary = _checked(model)
    refuse_autocast(source.device)
    config = source.config.get_text_config(decoder=True)
    longest, why = _reach(config, rotary)
    facts = TransformersFacts(
        name=type(source).__name__,
        fingerprint=fingerprint(source),
        dtype=source.dtype,
        device=source.device,
        max_positions=longest,
        ends_early=why,
        has_latents=_has_latents(config),
        shard=shard_of(source),
        hidden_layers=getattr(config, "num_hidden_layers", None),
        rotary=rotary,
        picked=picked_by_indexers(source),
    )
    return source, facts


def check_model(model: Any) -> PreTrainedModel:
    """`model`, or the model inside it that holds peft adapters, if it is a decoder-only causal language model.

    Raises:
        UnsupportedModelError: it is something else, is spread over devices, or rotates by angles that change with the
            length in ways that are not known; the message says what.
    """
    return _checked(model)[0]


def _checked(model: Any) -> tuple[PreTrainedModel, tuple[ChangingRotary, ...]]:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a model, got {type(model).__name__}; load it first")
    model = _adapted_model(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model; a plain module of (input_ids, position_ids) is given "
            "to transform with example_inputs=(input_ids, position_ids)"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder model; only decoders are supported")
    _check_state(model)
    _check_placement(model)
    return model, changing_rotary(model)


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
    invoked = [name for name, adapter in adapters.items() if getattr(adapter, "alora_invocation_tokens", None)]
    if invoked:
        raise UnsupportedModelError(
            f"the adapter {invoked[0]!r} of {type(model).__name__} is an activated LoRA, which acts behind its "
            "invocation tokens alone; which tokens those are is not known inside the layers, where it would be captured"
        )
    inner: nn.Module = model.get_base_model()  # type: ignore[operator]
    return inner


def _check_state(model: PreTrainedModel) -> None:
    """Nothing is kept of earlier tokens but keys and values, those of indexers, or the states of layers beside those
    that attend."""
    name = type(model).__name__
    picked_by_indexers(model)
    kinds = layer_kinds(model)
    attending = [kind for kind in kinds if kind in _ATTENTION_KINDS or kind in _BOTH_KINDS]
    if getattr(model, "_is_stateful", False) and not attending:
        raise nothing_to_budget(name)


def layer_kinds(model: PreTrainedModel) -> Sequence[str]:
    """What a model's configuration calls each of its layers; nothing where it does not tell them apart."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()


def nothing_to_budget(name: str) -> UnsupportedModelError:
    """The error for a model without attention."""
    return UnsupportedModelError(
        f"{name} has no attention: all that it keeps of earlier tokens is a state of fixed size, so there is nothing "
        "to budget"
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


def _reach(config: PreTrainedConfig, rotary: Sequence[ChangingRotary]) -> tuple[int | None, str]:
    """The longest sequence that a model is accepted for, None if unbounded; and, where the model has positions for
    more than that, what changes beyond it."""
    has = _positions(config)
    ends = []
    chunk = getattr(config, "attention_chunk_size", None)
    if isinstance(chunk, int) and "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        # within the first chunk, attention in chunks is plain causal attention
        ends.append((chunk, "some layers attend in chunks of that size (Llama 4), a new one of which begins there"))
    fixed = fixed_up_to(rotary)
    if fixed is not None:
        ends.append((fixed, "the angles of its rotary embedding change, those of kept keys too"))
    limits = [limit for limit in (*(end for end, _ in ends), has) if limit is not None]
    longest = min(limits, default=None)
    return longest, "; ".join(why for end, why in ends if end == longest != has)


def _has_latents(config: PreTrainedConfig) -> bool:
    """Whether any layer makes its keys and values from a latent; some models have a configuration for each layer."""
    layers = getattr(config, "per_layer_config", None) or (config,)
    return any(isinstance(getattr(layer, "kv_lora_rank", None), int) for layer in layers)


def _positions(config: PreTrainedConfig) -> int | None:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
