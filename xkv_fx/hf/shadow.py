"""Copies of a model to capture, which leave the user's model as it is."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.hf.inspect import TransformersFacts


def shadow(
    model: PreTrainedModel, facts: TransformersFacts, attention: str | None, settled: bool = True
) -> PreTrainedModel:
    """A copy of the modules of `model`, in evaluation mode, on the very same weights, with its own configuration.

    Args:
        attention: the implementation of attention to use; the model's own when None.
        settled: fix angles that would change with the length.

    The user's model is not touched.
    """
    own = {id(buffer) for rotary in facts.rotary for buffer in rotary.buffers(model)}
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own}
    twin = copy.deepcopy(model, weights)
    twin.eval()
    for rotary in facts.rotary if settled else ():
        rotary.settle(twin)
    if attention is None:
        return twin
    try:
        twin.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise UnsupportedModelError(
            f"{facts.name} does not let its attention be replaced ({error}); it cannot be captured"
        ) from error
    return twin
