"""Scores of a scorer that reads prompts again, from a cut graph: the prompt itself is attended to in full."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xkv_fx.errors import PromptError
from xkv_fx.passes.measure.cut_at_attention import CutModel
from xkv_fx.planning.measure.attentions import attentions_of
from xkv_fx.runtime.reading import Reading
from xkv_fx.runtime.scorers import PromptView, Scorer


@torch.no_grad()
def scores_of_second_reading(model: CutModel, scorer: Scorer, reading: Reading, ids: Tensor) -> dict[int, Tensor]:
    """The scores of a prompt's tokens in each cache, float32 `[1, kv_heads, S]` by the cache's index.

    The prompt is read again in pieces of `reading.chunk`, as it is when it is fed; a piece's second reading stands
    behind it, and its attention to earlier pieces counts for them as well.

    Args:
        model: a graph cut for one row.
        ids: int64 `[1, S]`.

    Raises:
        PromptError: a second reading ends behind the model's positions.
    """
    scores: dict[int, Tensor] = {}
    limit = model.max_positions
    for start in range(0, ids.shape[1], reading.chunk):
        new = ids[:, start : start + reading.chunk]
        twice, _ = reading.twice(new, torch.ones_like(new, dtype=torch.bool))
        text = torch.cat((ids[:, :start], twice), 1)
        if limit is not None and text.shape[1] > limit:
            raise PromptError(
                f"the second reading of a prompt of {ids.shape[1]} tokens would end at position {text.shape[1]}, and "
                f"the model has {limit}; give shorter prompts, or set the scorer's option chunk"
            )
        scores = _scores_of_piece(model, scorer, text, start, new.shape[1], scores)
    return scores


def _scores_of_piece(
    model: CutModel, scorer: Scorer, text: Tensor, start: int, new: int, before: dict[int, Tensor]
) -> dict[int, Tensor]:
    """The scores of all tokens up to the end of a piece of `new` tokens that begins at `start`.

    Args:
        text: the tokens up to the end of the piece, and its second reading.
        before: the scores of the first `start` tokens.
    """
    counted = torch.full((1,), new, dtype=torch.int64, device=text.device)
    earlier = torch.arange(start, device=text.device)[None, None]
    scores: dict[int, Tensor] = {}
    for attention in attentions_of(model, text):
        if attention.cache in scores:  # it borrows a cache
            continue
        q, k, v = attention.q, attention.k, attention.v
        view = PromptView(
            q[:, :, start:], k[:, :, start:], v[:, :, start:], counted, attention.form, counted - new + start
        )
        if start:
            view = dataclasses.replace(
                view, old_k=k[:, :, :start], old_v=v[:, :, :start],
                old_ordinals=earlier.expand(-1, k.shape[1], -1), old_scores=before[attention.cache],
            )  # fmt: skip
        scores[attention.cache] = scorer(view)[:, :, : start + new]
    return scores
