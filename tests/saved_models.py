"""A whole model in a folder, with a tokenizer."""

from __future__ import annotations

from pathlib import Path

from tiny_models import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = 300


def save_model(folder: Path) -> None:
    """Write a small random model of two layers, whose words are w2, w3, ..."""
    numbered = {word: token for token, word in enumerate(["[UNK]", "[BOS]", *(f"w{n}" for n in range(2, WORDS))])}
    words_of = Tokenizer(models.WordLevel(numbered, unk_token="[UNK]"))
    words_of.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_of, unk_token="[UNK]", pad_token="[UNK]")
    tokenizer.save_pretrained(folder)
    llama(2, vocab_size=WORDS).save_pretrained(folder)
