"""Prompts that a model is measured on."""

from __future__ import annotations

from torch import Tensor

from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import PromptError
from xkv_fx.runtime.session import refuse_unknown_tokens


def check_tokens(index: int, ids: Tensor, captured: CapturedModel) -> Tensor:
    """The token ids of a prompt, int64 `[1, S]`, on the model's device.

    Args:
        index: which prompt it is, for the message.

    Raises:
        PromptError: more tokens than the model has positions, or tokens that it does not have.
    """
    tokens, limit = ids.shape[1], captured.max_positions
    if limit is not None and tokens > limit:
        raise PromptError(f"prompt {index} has {tokens} tokens, more than the model's {limit} positions; cut it")
    refuse_unknown_tokens(ids, captured.vocabulary, f"prompt {index}")
    return ids.to(captured.device)
