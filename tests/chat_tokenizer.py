"""A tokenizer of characters with a chat template, for models of 61 tokens."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

END = 60
"""The token that ends a message, written `#`."""
_CHARACTERS = "\0 abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?!:.,\n#"


class ChatTokenizer:
    """Each character is a token; ids 0 and 60 are special. `@` cannot be tokenized."""

    chat_template: str | None = "written out below"

    def __call__(self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None) -> dict[str, Any]:
        return {"input_ids": [_CHARACTERS.index(character) for character in text]}

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        return "".join(_CHARACTERS[token] for token in ids if not (skip_special_tokens and token in (0, END)))

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool = True, add_generation_prompt: bool = False
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        for before, after in pairwise(messages):
            if before["role"] == after["role"]:
                raise ValueError("roles must alternate\nand more")
        return "".join(f"{message['role'][0]}:{message['content']}#\n" for message in messages) + "a:"
