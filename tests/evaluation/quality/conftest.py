"""What tests of the programs that make tables share."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
from ready_models import remember_programs
from tiny_models import llama
from transformers import PreTrainedModel
from word_tokenizer import WordTokenizer

from xkv_fx.hf.capture import capture

VOCABULARY = 500


@pytest.fixture(scope="session")
def table_model() -> PreTrainedModel:
    """The model that `on_table_model` lets programs load."""
    return llama(2, vocab_size=VOCABULARY)


@pytest.fixture
def on_table_model(table_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Lets a program that loads and captures a model find a tiny one, captured once."""

    def of(program: ModuleType) -> None:
        captured = capture(table_model, check=False)
        for module in ("xkv_fx.hf.capture", program.__name__):
            monkeypatch.setattr(f"{module}.capture", lambda *args, **options: captured)
        remember_programs(monkeypatch)
        monkeypatch.setattr(program, "load_model", lambda *args: (table_model, WordTokenizer(VOCABULARY)))

    return of
