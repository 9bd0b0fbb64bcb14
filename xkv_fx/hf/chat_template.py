"""Messages as a tokenizer's chat template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xkv_fx.errors import PromptError, first_line

Message = dict[str, str]


def check_template(tokenizer: Any) -> None:
    """Raise PromptError unless the tokenizer has a chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise PromptError(
            "this model's tokenizer has no chat template, so that nobody knows how it was taught to talk; take an "
            "instruct or chat model, or give the prompt as plain text, without --chat"
        )


def chat_text(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Messages as the template writes them, up to where the answer begins.

    Raises:
        PromptError: no template, or one that refuses these messages.
    """
    check_template(tokenizer)
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # what a template raises is its author's choice
        raise PromptError(f"the chat template refuses these messages: {first_line(error)}") from error
    return text


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Messages as the token ids of a prompt; errors as `chat_text`."""
    return ids_of(tokenizer, chat_text(tokenizer, messages))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text in which the template has put all special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
