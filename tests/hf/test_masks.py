"""What masks say is compared with what attention is told, also far beyond what a short prompt shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import gemma3, llama, mistral
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.hf.capture import layers_of_model
from xkv_fx.hf.masks import FARTHEST, OutOfSightError, check_masks

CAUSAL: Any = causal_mask_function
LAST = FARTHEST - 1


def sliding(size: int) -> Any:
    return sliding_window_causal_mask_function(size)


@pytest.mark.parametrize(
    ("masks", "windows"),
    [
        ([CAUSAL], [None, None]),
        ([sliding(4096)], [4096]),
        ([sliding(1), CAUSAL], [None, 1]),
        ([CAUSAL, sliding(131072)], [None, 131072]),
        ([CAUSAL, bidirectional_mask_function], [None]),
        ([sliding(10**6)], [10**6]),
        ([], [None]),
    ],
    ids=["causal", "sliding", "mixed", "far", "an encoder's beside", "beyond all positions", "none"],
)
def test_masks_that_attention_is_told_of(masks: list[Any], windows: list[int | None]) -> None:
    check_masks(llama(1), masks, windows, LAST)


def dilated(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & ((query - key) % 2 == 0)


@pytest.mark.parametrize(
    ("masks", "windows", "message"),
    [
        ([sliding(4096)], [None], "sliding windows 4096 but gives its attention none"),
        ([CAUSAL], [4096], "sliding windows none but gives its attention 4096"),
        ([sliding(4096)], [4097], "4096 but gives its attention 4097"),
        ([bidirectional_mask_function], [None], "tokens that come later"),
        ([chunked_causal_mask_function(8192, torch.zeros(1, dtype=torch.int64))], [None], "in chunks"),
        ([dilated], [None], "neither causal nor a sliding window"),
        ([and_masks(CAUSAL, or_masks(sliding(16), lambda b, h, q, k: k < 4))], [None], "neither causal nor"),
    ],
    ids=["untold", "told of another", "one off", "bidirectional", "chunks", "dilated", "sinks"],
)
def test_masks_that_would_be_lost(masks: list[Any], windows: list[int | None], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"LlamaForCausalLM .*{message}"):
        check_masks(llama(1), masks, windows, LAST)


def test_a_configured_window_that_no_layer_takes() -> None:
    with pytest.raises(UnsupportedModelError, match="sliding windows 64, none but gives its attention none"):
        check_masks(gemma3(2), [CAUSAL, sliding(64)], [None, None], LAST)


def test_a_mask_that_looks_tokens_up() -> None:
    groups = torch.zeros(1, 5, dtype=torch.int64)

    def by_group(row: Any, head: Any, query: Any, key: Any) -> Tensor:
        return (key <= query) & (groups[row, query] == groups[row, key])

    with pytest.raises(OutOfSightError):
        check_masks(llama(1), [by_group], [None], LAST)
    check_masks(llama(1), [by_group], [None], 4)


def test_a_window_beyond_every_prompt_of_the_checks() -> None:
    assert [spec.sliding_window for spec in layers_of_model(mistral(2, sliding_window=200))] == [200, 200]
