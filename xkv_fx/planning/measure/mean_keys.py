"""The mean key of each KV head and channel over the tokens of prompts, from one run of each up to the last keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xkv_fx.capture.facts import Shard
from xkv_fx.errors import PromptError
from xkv_fx.mean_keys import MeanKey, MeanKeys
from xkv_fx.passes.measure.cut_at_attention import CutModel
from xkv_fx.planning.measure.attentions import attentions_of
from xkv_fx.planning.measure.team import Arrays


@torch.no_grad()
def sums_of_keys(model: CutModel, ids: Tensor) -> dict[str, NDArray[np.float64]]:
    """The keys of each layer that owns a cache, as they are cached, summed over the tokens: float64
    `[kv_heads, key_dim]` by `name_of` the layer.

    Args:
        model: a graph cut for one row.
        ids: int64 `[1, S]`.

    Raises:
        PromptError: they are not finite.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    for attention in attentions_of(model, ids):
        name = name_of(attention.cache)
        if name not in sums:
            sums[name] = attention.k[0].double().sum(1).cpu().numpy()
    if not all(np.isfinite(of_layer).all() for of_layer in sums.values()):
        raise PromptError("the model's keys are not finite; was it run in a dtype that overflows?")
    return sums


def name_of(layer: int) -> str:
    """Under which the sum of a layer's keys is told to other processes, and kept."""
    return f"key_sum_{layer}"


def means_of(sums: Sequence[Arrays], tokens: int, layers: int) -> MeanKeys:
    """The means over the tokens of all prompts, added up in their order."""
    total = [np.sum([of_prompt[name_of(layer)] for of_prompt in sums], axis=0) for layer in range(layers)]
    return tuple(MeanKey(of_layer / tokens) for of_layer in total)


def gathered(means: MeanKeys, shard: Shard, device: torch.device) -> MeanKeys:
    """Those of all heads of the model, given those of one of the processes that share it."""
    if shard.size == 1:
        return means
    parts = [None if mean is None else torch.tensor(mean.values, device=device) for mean in means]
    return tuple(None if part is None else MeanKey(shard.all_heads(part[None])[0].cpu().numpy()) for part in parts)
