"""A tokenizer whose tokens are words and punctuation, for tests of what is written for real ones."""

from __future__ import annotations

import re
from collections.abc import Iterable


class WordTokenizer:
    """Numbers each new word when it first comes; decodes what it has seen.

    Args:
        vocabulary: ids are below this; words beyond it share ids, and are decoded as the first of them.
        start: the id that starts each prompt, if any.
    """

    def __init__(self, vocabulary: int = 1_000_000, start: int | None = None) -> None:
        self.vocabulary = vocabulary
        self.bos_token_id = start
        self.ids: dict[str, int] = {}
        self.words: dict[int, str] = {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        found = [self._id(word) for word in re.findall(r"\s*(?:[\w-]+|[^\w\s])|\s+$", text)]
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [*start, *found]}

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.words.get(int(token), "<>") for token in ids)

    def _id(self, word: str) -> int:
        if word not in self.ids:
            self.ids[word] = 3 + len(self.ids) % (self.vocabulary - 3)
            self.words.setdefault(self.ids[word], word)
        return self.ids[word]
