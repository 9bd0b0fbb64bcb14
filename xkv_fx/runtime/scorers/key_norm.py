"""The key's norm as a score, which needs no attention at all."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from xkv_fx.runtime.scorers.base import register_scorer
from xkv_fx.runtime.scorers.prompt import PromptView


@register_scorer("key_norm")
@dataclasses.dataclass(frozen=True)
class KeyNorm:
    """Minus the L2 norm of the key: keys of a small norm tend to be attended to most.

    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression" (arXiv 2406.11430). A rotary
    embedding leaves norms as they are.
    """

    paper: ClassVar[str] = "L2 norm of keys, arXiv 2406.11430"
    looks_at_question: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    measures_attention: ClassVar[bool] = False
    independent_heads: ClassVar[bool] = True

    def __call__(self, prompt: PromptView) -> Tensor:
        norm = prompt.of_keys(lambda keys, there: torch.linalg.vector_norm(keys, dim=-1))
        return -norm.masked_fill(~prompt.there, 0.0)
