"""The attentions of a cut graph one after another, when all tokens attend in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from xkv_fx.passes.measure.cut_at_attention import CutModel
from xkv_fx.runtime.attention import causal_attention
from xkv_fx.runtime.form import AttentionForm


@dataclasses.dataclass(frozen=True)
class Attention:
    """What one attention is given.

    Attributes:
        cache: the index of the layer that owns its cache.
        q, k, v: of all S tokens, `[1, query_heads or kv_heads, S, ...]`, rotated.
        form: of the attention.
    """

    cache: int
    q: Tensor
    k: Tensor
    v: Tensor
    form: AttentionForm


def attentions_of(model: CutModel, ids: Tensor) -> Iterator[Attention]:
    """Each attention in execution order; nothing behind the last one's inputs is run.

    Args:
        model: a graph cut for one row.
        ids: int64 `[1, S]`.
    """
    total = ids.shape[1]
    live = dict(zip(model.inputs, (ids, torch.arange(total, device=ids.device)[None]), strict=True))
    for index, site in enumerate(model.sites):
        segment = model.segments[index]
        inputs = [live[value.name] if value.size is None else value.size_of(total) for value in segment.inputs]
        live |= dict(zip((value.name for value in segment.outputs), segment.run(inputs), strict=True))
        q, k, v = (live[node.name] for node in (site.q, site.k, site.v))
        form = dataclasses.replace(site.form, sink_logits=model.sink_logits.get(index))
        yield Attention(site.index, q, k, v, form)
        if index + 1 < len(model.sites):
            live = {name: part for name, part in live.items() if name in model.needed_from[index + 1]}
            live[site.node.name] = causal_attention(q, k, v, form)[0].contiguous()
