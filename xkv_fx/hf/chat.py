"""Conversations that go on in the bounded memory of a session."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from xkv_fx.errors import PromptError
from xkv_fx.hf.cache import SessionCache
from xkv_fx.hf.chat_template import Message, chat_text, ids_of
from xkv_fx.runtime.choose_tokens import Choose
from xkv_fx.runtime.many.growing import GrowingText

TurnReason = Literal["end", "length", "stopped"]
"""Why an answer ended: an end token, its number of tokens, or the user."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """An answer in a conversation.

    Attributes:
        text: without special tokens.
        tokens: how many were generated.
        reason: why it ended.
    """

    text: str
    tokens: int
    reason: TurnReason


class Conversation:
    """A chat that goes on in the bounded memory of one session.

    A turn feeds only what is new: the end of the last answer, what the user says, and the template's words around it.

    Args:
        session: a new one of a model of one row.
        tokenizer: with a chat template.
        end_tokens: tokens that end an answer.
        choose: takes tokens from logits.
        system: what is said before the conversation.

    Attributes:
        ids: all tokens so far; the last may not have been fed yet.

    Raises:
        PromptError: no chat template, or one that takes no system prompt.
    """

    def __init__(
        self,
        session: SessionCache,
        tokenizer: Any,
        end_tokens: Sequence[int],
        choose: Choose,
        system: str | None = None,
    ) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._ends = frozenset(end_tokens)
        self._choose = choose
        self._before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.ids: list[int] = []
        chat_text(tokenizer, [*self._before, {"role": "user", "content": "x"}])

    @property
    def session(self) -> SessionCache:
        """What is held of the conversation."""
        return self._session

    def forget(self) -> None:
        """Start anew."""
        self._session.reset()
        self.ids = []

    def say(
        self,
        text: str,
        max_new_tokens: int,
        show: Callable[[str], None] = lambda part: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Turn:
        """Say something; returns the answer.

        Args:
            show: called with each part of the answer as it comes.
            stopped: asked after each token whether that is enough.

        Raises:
            PromptError, CapacityError: there is no room left for what is said and so many tokens of answer; nothing has
                been fed then.
        """
        fed = self._session.fed
        new = [*self.ids[fed:], *ids_of(self._tokenizer, self._turn(text))]
        ids = torch.tensor([new], dtype=torch.int64, device=self._session.session.program.plan.device)
        self._session.session.check_room(max_new_tokens, ids)
        logits = self._session.feed(ids, None, None, False)
        self.ids = [*self.ids[:fed], *new]
        growing, count = GrowingText(self._tokenizer), 0
        reason: TurnReason = "length"
        while count < max_new_tokens:
            chosen = self._choose(logits[:, -1])
            token, count = int(chosen[0]), count + 1
            self.ids.append(token)
            if token in self._ends:
                reason = "end"
                break
            show(growing.add(token))
            if stopped():
                reason = "stopped"
                break
            if count < max_new_tokens:
                logits = self._session.step(chosen[:, None], None)
        show(growing.rest())
        return Turn(growing.text, count, reason)

    def _turn(self, text: str) -> str:
        """What the template writes between the last answer and the next one."""
        said = {"role": "user", "content": text}
        if not self.ids:
            return chat_text(self._tokenizer, [*self._before, said])
        mark = secrets.token_hex(16)
        earlier = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
        _, found, behind = chat_text(self._tokenizer, [*self._before, *earlier, said]).partition(mark)
        if not found:
            raise PromptError(
                "the chat template leaves earlier answers out, so that no conversation can go on from them"
            )
        if self.ids[-1] in self._ends:  # the answer has closed itself
            behind = behind.removeprefix(self._tokenizer.decode([self.ids[-1]]))
        return behind

    def held(self) -> Tensor:
        """For each token that was fed, the share of layers and KV heads that hold it, float32 `[tokens]`."""
        return held_shares(self._session)[0]


def held_shares(session: SessionCache) -> Tensor:
    """For each row and token seen, the share of layers and KV heads that hold it now: float32 `[rows, tokens]`."""
    tokens = max(session.session.seen, default=0)
    held = torch.zeros(session.batch_size, tokens + 1)
    heads = 0
    for layer in range(len(session)):
        ordinals = session.kept_positions(layer).cpu()  # -1, a free slot, is counted in the last column
        held.scatter_add_(1, ordinals.flatten(1).remainder(tokens + 1), torch.ones(ordinals.flatten(1).shape))
        heads += ordinals.shape[1]
    return held[:, :tokens] / heads
