"""Prompts as users give them, strings or token ids, turned into token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xkv_fx.errors import PromptError


def tokenize(prompts: Sequence[str | Tensor | Sequence[int]], tokenizer: Any = None) -> tuple[Tensor, ...]:
    """Token ids int64 `[1, S]` of each prompt.

    Raises:
        PromptError: no prompts, an empty one, a string without a tokenizer, or something that is no prompt.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise PromptError("prompts must be a list of at least one string or tensor of token ids")
    return tuple(tokenize_one(f"prompt {index}", prompt, tokenizer) for index, prompt in enumerate(prompts))


def tokenize_one(name: str, prompt: str | Tensor | Sequence[int], tokenizer: Any) -> Tensor:
    """As `tokenize`, for one prompt, which messages call by that name."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise PromptError(f"{name} is a string; pass the model's tokenizer too, or give token ids")
        prompt = tokenizer(prompt)["input_ids"]
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(f"{name} is neither a string nor token ids: {error}") from error
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise PromptError(f"{name} must be one row of token ids; got the shape {list(ids.shape)}")
    if ids.shape[1] == 0:
        raise PromptError(f"{name} is empty; give at least one token")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise PromptError(f"{name} must be token ids, whole numbers; got {ids.dtype}")
    return ids.long()


def second_turns(tasks: Sequence[tuple[Any, Any]], tokenizer: Any = None) -> tuple[tuple[Tensor, int], ...]:
    """Token ids int64 `[1, S + T]` of each text with what comes behind it, and T, the tokens of the latter.

    Raises:
        PromptError: as `tokenize`; or a task that is no pair.
    """
    if not isinstance(tasks, Sequence) or not all(isinstance(task, tuple | list) and len(task) == 2 for task in tasks):
        raise PromptError("tasks must be pairs of a text and what comes behind it in a second turn")
    joined = []
    for text, behind in tasks:
        first, second = tokenize([text, behind], tokenizer)
        joined.append((torch.cat((first, second), 1), second.shape[1]))
    return tuple(joined)
