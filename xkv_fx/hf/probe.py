"""What a model's attentions are, seen while a copy of it runs once on a few tokens."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from xkv_fx.capture.export import refusing
from xkv_fx.hf.inspect import TransformersFacts
from xkv_fx.hf.masks import FARTHEST, OutOfSightError, check_masks, recording_masks
from xkv_fx.layers import LayerSpec


@dataclasses.dataclass(frozen=True)
class Attentions:
    """The attentions of a model that went through the implementation "xkv".

    Attributes:
        count: how many there were.
        layers: what each of them caches; one that attends to the K/V of an earlier one, nothing. Keys of indexers are
            left out.
        picked: how many keys were picked for each query of those that have an indexer.
    """

    count: int
    layers: tuple[LayerSpec, ...]
    picked: tuple[int, ...] = ()


def probe(twin: PreTrainedModel, facts: TransformersFacts, length: int = 2) -> Attentions:
    """Run a model on `length` tokens, more if its masks show too little then.

    Args:
        twin: a copy of the model whose attention is "xkv".

    Raises:
        UnsupportedModelError: it does not run, or its masks are not those that its attention is told of.
    """
    ids = torch.zeros(1, length, dtype=torch.int64, device=facts.device)
    positions = torch.arange(length, device=facts.device)[None]
    record = _RecordAttention()
    with refusing(facts.name), torch.no_grad(), recording_masks() as masks, record:
        logits_of(twin, ids, positions)
    windows = record.windows
    if not windows:
        return Attentions(0, ())
    longest = facts.max_positions or FARTHEST
    try:
        check_masks(twin, masks, windows, length - 1 if length > 2 else min(longest, FARTHEST) - 1)
    except OutOfSightError:
        enough = min(2 * max((window or 0 for window in windows), default=0) + 64, longest)
        return probe(twin, facts, max(enough, 3))
    return Attentions(len(windows), tuple(record.layers), tuple(record.picked))


def logits_of(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, inside: PreTrainedModel | None = None
) -> Tensor:
    """Logits without a cache. A model that takes no positions counts them itself.

    Args:
        inside: the model that `model` hands its arguments on to; itself when None.
    """
    forward = (inside or model).forward
    kinds = {name: parameter.kind for name, parameter in inspect.signature(forward).parameters.items()}
    takes_positions = "position_ids" in kinds or inspect.Parameter.VAR_KEYWORD in kinds.values()
    options = {"position_ids": position_ids} if takes_positions else {}
    logits: Tensor = model(input_ids=input_ids, use_cache=False, return_dict=True, **options).logits
    return logits


class _RecordAttention(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers: list[LayerSpec] = []
        self.windows: list[int | None] = []
        self.picked: list[int] = []
        self._cached: list[tuple[Tensor, Tensor, int | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.xkv.attention.default:
            q, k, v = args[:3]
            window = args[5] if len(args) > 5 else None
            self.windows.append(window)
            if not any(k is keys and v is values and window == other for keys, values, other in self._cached):
                self._cached.append((k, v, window))
                value_dim = 0 if v is k else v.shape[3]
                self.layers.append(LayerSpec(q.shape[1], k.shape[1], k.shape[3], value_dim, k.dtype.itemsize, window))
        elif func is torch.ops.xkv.masked_queries.default and len(args) > 2 and args[2] is not None:
            self.picked.append(args[2].shape[-1])
        return func(*args, **(kwargs or {}))
