"""How far the answers of many requests have come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from xkv_fx.runtime.many.request import Answer

Advance = Callable[[Answer], None]


@contextmanager
def answer_bar(progress: bool | Callable[[int, int], None], known: int | None) -> Iterator[Advance]:
    """What to call with each answer: it draws a bar on stderr, calls `progress(done, known)`, or does nothing.

    Args:
        known: how many answers there will be; as many as there are so far when None.
    """
    if progress is True:
        with _drawn(known) as advance:
            yield advance
        return
    done = 0

    def count(answer: Answer) -> None:
        nonlocal done
        done += 1
        if callable(progress):
            progress(done, done if known is None else known)

    yield count


@contextmanager
def _drawn(known: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task, tokens, start = bar.add_task("", total=known), 0, time.perf_counter()

        def count(answer: Answer) -> None:
            nonlocal tokens
            tokens += len(answer.ids)
            rate = tokens / (time.perf_counter() - start)
            bar.update(task, advance=1, description=f"{tokens} tokens, {rate:.1f}/s")

        yield count
