"""Our entry in transformers' attention interface, `"xkv"`; importing this module registers it.

While a model is captured, each attention becomes one `xkv::attention` node. While `torch.compile` traces a model for
the backend `"xkv"`, it leaves marks besides, of padding and of what cannot be captured. Elsewhere it is plain causal
attention, which is exact with padding and without a cache; a cache is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from xkv_fx.errors import SessionError, UnsupportedModelError, XkvError
from xkv_fx.hf.masks import padding_mask, picking_mask
from xkv_fx.hf.recompile_limit import RAISE_LIMIT
from xkv_fx.passes.prepare.compact_padding import places
from xkv_fx.runtime import capture_marks, ops  # noqa: F401  (register the marks and the ops)
from xkv_fx.runtime.tracing_marks import FOREIGN_CACHE

NAME = "xkv"
CAPTURED_NAME = "xkv_captured"
"""The name of the same attention while a model is exported, after its masks were checked. It has no registered mask
function, so transformers makes no masks; under `NAME` they would be traced and then thrown away."""
PICKING_NAME = "xkv_picking"
"""The name of the same attention while a model with indexers is looked at and exported. These pick keys below a mask,
so there is one, and attention is told what they have picked."""
# Arguments that say nothing about the mathematics of attention once the mask is causal.
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal",
    "logits_to_keep",
}  # fmt: skip
_MASK, _NOT_CAUSAL, _ARGUMENTS, _NO_LAYER = range(1, 5)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in the place of attention.

    Args:
        query: `[rows, query_heads, S, key_dim]`.
        key, value: `[rows, kv_heads, S, ...]`, not repeated.
        attention_mask: None, or what `padding_mask` returned: bool `[rows, S]`, False for padding.

    Returns:
        `[rows, S, query_heads, value_dim]`.

    Raises:
        UnsupportedModelError: the model gives its attention something that `xkv::attention` does not know.
        SessionError: there are more keys than queries, from a cache that is not ours.
    """
    unknown = sorted(
        name for name, given in kwargs.items() if given is not None and given is not False and name not in _HARMLESS
    )
    layer = getattr(module, "layer_idx", None)
    # Decoders that leave is_causal at its default have causal masks; which masks a model makes is checked besides.
    of_decoder = getattr(module, "is_causal", True) or getattr(module, "is_decoder", False) is True
    causal = of_decoder and kwargs.get("is_causal") in (None, True)
    reason = _reason(query, key, attention_mask, causal, bool(unknown), layer is None)
    if reason is not None and torch.compiler.is_dynamo_compiling():
        query, attention_mask = torch.ops.xkv.refused(query, reason), None
        key, value = (query.new_empty((*states.shape[:2], query.shape[2], states.shape[3])) for states in (key, value))
    elif reason is not None:
        raise refusal(reason, type(module).__name__, ", ".join(unknown))
    if not torch.compiler.is_compiling():
        _check_starts(query, kwargs.get("position_ids"), type(module).__name__)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    options = (layer, scale, sliding_window, softcap, s_aux)
    if attention_mask is None or torch.compiler.is_dynamo_compiling():
        if attention_mask is not None:
            key = torch.ops.xkv.keys_with_padding(key, attention_mask)
        out = torch.ops.xkv.attention(query, key, value, *options)
    else:
        out = _attention_with_padding(query, key, value, attention_mask, options)
    return out.transpose(1, 2).contiguous(), None


def captured_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `attention`, for export alone.

    Raises:
        UnsupportedModelError: as `attention`; or a model is run under this name, whose padding nobody would see.
    """
    if not torch.compiler.is_exporting():
        raise UnsupportedModelError(
            f"{type(module).__name__} runs under the attention {CAPTURED_NAME!r}, which is for capture; use {NAME!r}"
        )
    return attention(module, query, key, value, attention_mask, **options)


def picking_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    indices: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `attention`, for models with indexers; the queries are marked with their mask and the keys that they reach.

    Args:
        attention_mask: what `picking_mask` returned.
        indices: the places of the keys that each query reaches, `[rows, S, any]`; None for all.

    Raises:
        UnsupportedModelError: as `attention`; or keys are picked without a mask.
    """
    if attention_mask is not None:
        query = torch.ops.xkv.masked_queries(query, attention_mask, indices)
    elif indices is not None:
        raise UnsupportedModelError(f"{type(module).__name__} has its keys picked without a mask")
    return attention(module, query, key, value, None, **options)


def refusal(reason: int, where: str, arguments: str = "arguments of its own") -> XkvError:
    """The error for a given reason; a graph may hold that reason as the argument of `xkv::refused`."""
    if reason == _MASK:
        return UnsupportedModelError(f"{where} adds a mask of its own to attention; it cannot be captured exactly")
    if reason == _NOT_CAUSAL:
        return UnsupportedModelError(
            f"{where} does not attend causally; only causal attention has a KV cache to budget"
        )
    if reason == _ARGUMENTS:
        return UnsupportedModelError(
            f"{where} gives its attention {arguments}, which this version cannot carry over exactly"
        )
    if reason == _NO_LAYER:
        return UnsupportedModelError(
            f"{where} has no layer_idx, so its cache cannot be told from those of other layers"
        )
    return SessionError(
        f"{where} was given a cache that is not ours: the attention 'xkv' works with no cache but its own; compile the "
        "model with backend='xkv' and pass past_key_values=xkv_fx.Cache(model, budgets), or pass use_cache=False"
    )


def _check_starts(query: Tensor, position_ids: Tensor | None, where: str) -> None:
    """Refuse tokens that come after others when there is no cache: attention would silently ignore the earlier ones. A
    call ends up here when Dynamo no longer compiles it."""
    alone = query.shape[2] == 1 if position_ids is None else bool((position_ids.amin(-1) > 0).any())
    if alone:
        raise SessionError(
            f"{where} is given tokens that others came before, but no cache. If the model was compiled with "
            f"backend='xkv', Dynamo has given up on it. {RAISE_LIMIT}"
        )


def _reason(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, unknown: bool, no_layer: bool) -> int | None:
    """Why this attention cannot be taken over; None if it can."""
    if mask is not None and (mask.dim() != 2 or mask.dtype != torch.bool):
        return _MASK
    if not causal:
        return _NOT_CAUSAL
    if unknown:
        return _ARGUMENTS
    if no_layer:
        return _NO_LAYER
    return FOREIGN_CACHE if key.shape[2] != query.shape[2] else None


def _attention_with_padding(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor, options: tuple[Any, ...]
) -> Tensor:
    """Causal attention among the valid tokens of each row; the outputs at padding are meaningless."""
    _, place = places(valid)
    origin = place.argsort(1)

    def ordered(states: Tensor, order: Tensor) -> Tensor:
        return states.gather(2, order[:, None, :, None].expand_as(states))

    moved = (ordered(states, origin) for states in (query, key, value))
    return ordered(torch.ops.xkv.attention(*moved, *options), place)


AttentionInterface.register(NAME, attention)
AttentionInterface.register(CAPTURED_NAME, captured_attention)
AttentionInterface.register(PICKING_NAME, picking_attention)
AttentionMaskInterface.register(NAME, padding_mask)
AttentionMaskInterface.register(PICKING_NAME, picking_mask)
