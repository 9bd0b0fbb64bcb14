"""The loop that keeps rows busy: prompts are fed beside the batch, and a row that ends takes the next one over."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator

from torch import Tensor

from xkv_fx.errors import CapacityError, PromptError
from xkv_fx.runtime.choose_tokens import likeliest
from xkv_fx.runtime.many.growing import Growing, Job
from xkv_fx.runtime.many.request import Answer
from xkv_fx.runtime.many.rows import Rows
from xkv_fx.runtime.many.staging import Staging


@dataclasses.dataclass
class _Fed:
    """A prompt that is being fed."""

    job: Job
    parts: Generator[float, None, tuple[Tensor, int]]


class ServingLoop:
    """Answers any number of requests with a fixed number of rows.

    One prompt at a time is fed in the row beside the batch, ahead of need. Between two decode steps prompts are fed for
    about `pace` tokens through the whole model, so that no running row waits longer; where no row runs, nobody waits.

    Args:
        rows: where answers grow.
        staging: where prompts are fed.
        jobs: what is asked; an answer stands for a request that failed already. Each is taken when it can be fed.
        pace: tokens of prompt between two decode steps.
        cancelled: numbers of requests that are no longer wanted. The caller may add to it at any time.
    """

    def __init__(
        self, rows: Rows, staging: Staging, jobs: Iterator[Job | Answer], pace: int, cancelled: set[int]
    ) -> None:
        self._staging = staging
        self._rows = rows
        self._jobs: Iterator[Job | Answer] | None = jobs
        self._pace = pace
        self._cancelled = cancelled
        self._running: list[Growing | None] = [None] * rows.count
        self._fed: _Fed | None = None
        self._ready: Growing | None = None

    def answers(self) -> Iterator[Answer]:
        """Each answer once it has ended, until there are no more requests."""
        while True:
            yield from self._drop_cancelled()
            yield from self._prepare()
            if any(self._running):
                yield from self._step()
            elif self._jobs is None and self._fed is None:
                return

    def _drop_cancelled(self) -> Iterator[Answer]:
        for row, growing in enumerate(self._running):
            if growing is not None and growing.job.index in self._cancelled:
                self._running[row] = None
                yield growing.answer("cancelled")
        if self._ready is not None and self._ready.job.index in self._cancelled:
            dropped, self._ready = self._ready, None
            yield dropped.answer("cancelled")
        if self._fed is not None and self._fed.job.index in self._cancelled:
            dropped, self._fed = Growing(self._fed.job), None
            yield dropped.answer("cancelled")

    def _prepare(self) -> Iterator[Answer]:
        """Feed prompts until `pace` is reached or one waits for a row; a ready one goes to a row that is free."""
        left = float(self._pace)
        while left > 0:
            if self._ready is not None:
                if None not in self._running:
                    return
                row = self._running.index(None)
                self._rows.put(row, self._staging.state)
                self._running[row], self._ready = self._ready, None
            if self._fed is None:
                taken = None if self._jobs is None else next(self._jobs, None)
                if taken is None:
                    self._jobs = None
                    return
                if isinstance(taken, Answer):
                    yield taken
                    continue
                if taken.index in self._cancelled:
                    yield Growing(taken).answer("cancelled")
                    continue
                self._fed = _Fed(taken, self._staging.feed(taken.ids, taken.max_new_tokens))
            left -= yield from self._feed(self._fed)

    def _feed(self, fed: _Fed) -> Generator[Answer, None, float]:
        """Feed one part of a prompt; returns its cost. Behind the last part the first token is chosen."""
        try:
            return next(fed.parts)
        except (PromptError, CapacityError) as error:
            self._fed = None
            yield Answer(fed.job.index, (), None, "error", error, fed.job.ids.shape[1])
        except StopIteration as end:
            logits, shared = end.value
            self._fed = None
            growing = Growing(fed.job, shared)
            reason = growing.add(int(fed.job.choose(logits)[0]))
            if reason is None:
                self._ready = growing
            else:
                yield growing.answer(reason)
        return 1.0

    def _step(self) -> Iterator[Answer]:
        logits = self._rows.step([None if growing is None else growing.ids[-1] for growing in self._running])
        likely = likeliest(logits).tolist()
        for row, growing in enumerate(self._running):
            if growing is None:
                continue
            choose = growing.job.choose
            reason = growing.add(likely[row] if choose is likeliest else int(choose(logits[row : row + 1])[0]))
            if reason is not None:
                self._running[row] = None
                yield growing.answer(reason)
