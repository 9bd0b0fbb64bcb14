"""One prefill for many plans.

A prompt is attended to in full whatever the budgets are; only what each layer keeps of it differs. So its keys, values
and scores are recorded once, and each plan's session is filled with the survivors that its own prefill would choose, by
the very function that does so there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xkv_fx.capture.captured import CapturedModel
from xkv_fx.errors import BudgetError, UnsupportedModelError
from xkv_fx.evaluation.quality.answering import BudgetedReader
from xkv_fx.planning.measure.continuation import cut_model
from xkv_fx.planning.measure.second_reading import scores_of_second_reading
from xkv_fx.policy import Policy
from xkv_fx.public_budgets import Budgets
from xkv_fx.runtime.scorers import Scorer, reading_of, scorer_of
from xkv_fx.runtime.selection import write_survivors


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A prompt of S tokens that was read once.

    Attributes:
        logits: after its last token, `[1, vocabulary]`.
        layers: keys, values and scores of each layer: `[1, kv_heads, S, ...]`, scores float32 `[1, kv_heads, S]`.
        tokens: S.
    """

    logits: Tensor
    layers: tuple[tuple[Tensor, Tensor, Tensor], ...]
    tokens: int

    def into(self, reader: BudgetedReader) -> Tensor:
        """Bring a reader to the state that it would be in after reading the prompt itself; returns the logits."""
        session = reader.session.session
        state, plan = session.state, session.program.plan
        counted = torch.full((1,), self.tokens, dtype=torch.int64, device=plan.device)
        zero = torch.zeros_like(counted)
        for layer, recorded in enumerate(self.layers):
            for cache in plan.caches_of(layer):  # several where the layer is planned by KV head
                held = state.of(cache)
                k, v, scores = (part[:, list(cache.heads)] for part in recorded)
                buffers = (held["k"], held["v"], held["positions"])
                kept = write_survivors(k, v, scores, counted, zero, zero, *buffers, cache.slots, fresh=True)
                if "scores" in held:
                    held["scores"].copy_(kept)
        for count in session.counts.values():
            count.copy_(counted)
        session.restore(state, self.tokens)
        return self.logits


class Recorder:
    """Reads prompts for all plans that rank tokens by one scorer.

    It is a plan of its own: room for everything, evicting by score, since that is what keeps the scores. Those of a
    scorer that reads prompts again are taken from the captured graph instead.

    Args:
        llm: any transformed model for one row.
        policy: of the plans.
        tokens: of the longest prompt.
    """

    def __init__(self, llm: Any, policy: Policy, tokens: int) -> None:
        captured = llm.program.graphs.captured
        scorer = captured.scorer_of(Policy(policy.scorer, policy.scorer_options))
        reading = reading_of(scorer)
        self.read_again: Callable[[Tensor], dict[int, Tensor]] | None = None
        recording = Policy(policy.scorer, policy.scorer_options, eviction="scored")
        if reading is not None:
            recording = Policy(eviction="scored")
            self.read_again = functools.partial(scores_of_second_reading, cut_model(captured, scorer), scorer, reading)
        self.reader = BudgetedReader(llm.with_budgets(Budgets.uniform(len(llm.layers), tokens, recording)))

    def read(self, ids: Tensor) -> Recorded:
        """Read a prompt, int64 `[1, S]`."""
        self.reader.start_again()
        logits = self.reader.read(ids)
        tokens = ids.shape[1]
        session = self.reader.session.session
        layers = [session.state.of(cache) for cache in session.program.plan.caches]
        k, v, scores = ([held[field][:, :, :tokens].clone() for held in layers] for field in ("k", "v", "scores"))
        if self.read_again is not None:
            again = self.read_again(ids)
            scores = [again[index] for index in range(len(layers))]
        return Recorded(logits.clone(), tuple(zip(k, v, scores, strict=True)), tokens)


def can_record(llm: Any, policy: Policy, tokens: int) -> bool:
    """Whether a recorder can hold every one of so many tokens with its score, and all else that is kept: not where a
    layer forgets what has left its sliding window, or keeps an indexer's keys or a recurrent state besides; not for a
    scorer whose scores are no sums of attention; and not for one that reads prompts again where they are longer than
    its piece, since plans choose survivors behind each, or where the graph cannot be cut."""
    plan = llm.program.plan
    if plan.recurrent or any(spec.sliding_window is not None or spec.index_dim for spec in plan.layers):
        return False
    scorer = scorer_of(Policy(policy.scorer, policy.scorer_options))
    reading = reading_of(scorer)
    if reading is not None:
        return tokens <= reading.chunk and _can_cut(llm.program.graphs.captured, scorer)
    try:
        scorer_of(Policy(policy.scorer, policy.scorer_options, eviction="scored"))
    except BudgetError:
        return False
    return True


def _can_cut(captured: CapturedModel, scorer: Scorer) -> bool:
    try:
        cut_model(captured, scorer)
    except UnsupportedModelError:
        return False
    return True
