"""One row beside a batch, in which the next prompt is fed while the batch decodes."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Protocol

import torch
from torch import Tensor

from xkv_fx.errors import PromptError
from xkv_fx.runtime.session import Program, Session
from xkv_fx.runtime.state import GraphKind, State


class Parts(Protocol):
    """A graph that runs as far as it is taken.

    Attributes:
        parts: into how many it falls.
    """

    parts: int

    def advance(self) -> Tensor | None:
        """Run one part; returns the logits with the last."""
        ...


class PromptProgram(Program, Protocol):
    """A program of one row whose prompts may be fed a layer at a time."""

    def prompt_in_parts(self, kind: GraphKind, *inputs: Tensor) -> Parts: ...


class Staging:
    """Feeds one prompt after the other to one row, in parts, so that others may decode between them.

    A prompt is fed whole, so that survivors are chosen as `generate` chooses them, and a part is one layer of it; with
    `chunk`, so many tokens at a time, as `generate` does with `prefill_chunk_size`.

    Args:
        program: for one row.
        chunk: the most tokens fed at once; None for any number.
        prefix: token ids, int64 `[1, S]`, that many prompts begin with. It is fed on its own, the first time that a
            prompt begins with it, and later ones go on from a copy of what it left.
    """

    def __init__(self, program: PromptProgram, chunk: int | None = None, prefix: Tensor | None = None) -> None:
        self._program = program
        self._session = Session(program)
        self._chunk = chunk
        self._prefix = prefix
        self._of_prefix: tuple[Session, Tensor] | None = None

    @property
    def state(self) -> State:
        """What the prompt left, once it is fed."""
        return self._session.state

    def feed(self, ids: Tensor, max_new_tokens: int) -> Generator[float, None, tuple[Tensor, int]]:
        """Feed a prompt, int64 `[1, S]`, in place of the one before it.

        Yields:
            after each part but the last its cost, in tokens through the whole model.

        Returns:
            the logits `[1, vocabulary]` of the prompt's last token, and how many of its tokens a copy of the prefix had
            seen.

        Raises:
            PromptError, CapacityError: as `Session.check_room`, before anything is fed.
        """
        self._session.reset()
        self._session.check_room(max_new_tokens, ids)
        length = 0 if self._prefix is None else self._prefix.shape[1]
        if self._prefix is None or not torch.equal(ids[:, :length], self._prefix):
            return (yield from self._feed_chunks(ids)), 0
        behind, shared = ids[:, length:], 0 if self._of_prefix is None else length
        if self._of_prefix is None:
            logits = yield from self._feed_chunks(self._prefix)
            self._of_prefix = (self._session.fork(), logits)
        else:
            kept, logits = self._of_prefix
            self._session.restore(kept.state, kept.history.fed, kept.transcript.ids)
        if behind.shape[1]:
            logits = yield from self._feed_chunks(behind)
        return logits, shared

    def _feed_chunks(self, ids: Tensor) -> Generator[float, None, Tensor]:
        """Feed tokens behind what the row holds; returns the last one's logits."""
        logits: Tensor | None = None
        cost = 0.0
        for piece in self._pieces(ids):
            if logits is not None:
                yield cost
            feeding = self._session.begin_feed(piece)
            running = self._program.prompt_in_parts(feeding.kind, *feeding.inputs, *self._session.state.tensors)
            cost = feeding.inputs[0].shape[1] / running.parts
            while (logits := running.advance()) is None:
                yield cost
            self._session.end_feed(feeding)
        if logits is None:
            raise PromptError("the prompt is empty; give at least one token")
        return logits[:, -1]

    def _pieces(self, ids: Tensor) -> Iterator[Tensor]:
        """What is fed at once: a chunk, or as much of it as a scorer that reads prompts again takes."""
        reading, columns = self._program.plan.reading, ids.shape[1]
        for start in range(0, columns, self._chunk or columns):
            chunk = ids[:, start : start + (self._chunk or columns)]
            size = chunk.shape[1] if reading is None else reading.chunk
            for place in range(0, chunk.shape[1], size):
                yield chunk[:, place : place + size]
