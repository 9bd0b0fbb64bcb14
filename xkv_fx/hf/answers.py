"""Answers as they come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Self

from xkv_fx.hf.answer_bar import answer_bar
from xkv_fx.runtime.many.loop import ServingLoop
from xkv_fx.runtime.many.request import Answer


class Answers(Iterator[Answer]):
    """The answers to many requests. Work is done while the next one is asked for.

    Args:
        start: makes the loop, given a set that `cancel` adds to.
        known: how many requests there are; None if nobody knows yet.
        in_order: answers come in the order of their requests.
        progress: draw a bar, or call this as `progress(done, known)` after each answer.
    """

    def __init__(
        self,
        start: Callable[[set[int]], ServingLoop],
        known: int | None,
        in_order: bool,
        progress: bool | Callable[[int, int], None],
    ) -> None:
        self._cancelled: set[int] = set()
        self._answers = self._all(start, known, progress)
        self._in_order = in_order
        self._held: dict[int, Answer] = {}
        self._next = 0

    def __next__(self) -> Answer:
        while True:
            if self._in_order and self._next in self._held:
                self._next += 1
                return self._held.pop(self._next - 1)
            answer = next(self._answers)
            if not self._in_order:
                return answer
            self._held[answer.index] = answer

    def cancel(self, index: int) -> None:
        """Give a request up: its answer has the tokens so far, and the reason `"cancelled"`. One that has ended stays
        as it is. May be called from another thread."""
        self._cancelled.add(index)

    def close(self) -> None:
        """Give all up, and free their memory; no more answers come."""
        self._answers.close()
        self._held.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _all(
        self,
        start: Callable[[set[int]], ServingLoop],
        known: int | None,
        progress: bool | Callable[[int, int], None],
    ) -> Generator[Answer, None, None]:
        with answer_bar(progress, known) as advance:
            for answer in start(self._cancelled).answers():
                advance(answer)
                yield answer
