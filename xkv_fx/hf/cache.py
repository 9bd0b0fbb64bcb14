"""The session that `generate` sees: a transformers `Cache` around a runtime session."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from xkv_fx.errors import SessionError
from xkv_fx.runtime.session import Program, Session
from xkv_fx.runtime.session_file import load_session, save_session
from xkv_fx.runtime.tracing_marks import FOREIGN_CACHE


class SessionCache(Cache):
    """One conversation, or one batch of them, with K/V buffers of exactly the planned size.

    Take one from `llm.new_session()` and pass it as `past_key_values`, with the whole conversation each time, as
    transformers' own caches are used.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, program: Program) -> None:
        super().__init__(layers=[])
        self.session = Session(program)

    @property
    def fed(self) -> int:
        """Tokens a row fed so far, padding included: what transformers slices the conversation by."""
        return self.session.history.fed

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens a row fed so far, evicted ones and padding included."""
        return self.fed

    @property
    def is_linear(self) -> list[bool]:
        """For transformers, which takes a cache for one of linear attention when all of this list is true, as of an
        empty one, and then feeds the whole conversation again."""
        return [False]

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for K/V."""
        return self.session.state.kv_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes allocated for positions and counters."""
        return self.session.state.state_bytes

    @property
    def tokens_seen(self) -> Tensor:
        """Valid tokens that each row has seen, int64 `[rows]`."""
        return self.session.counts["seen"].clone()

    def kept_positions(self, layer: int) -> Tensor:
        """Ordinals of the tokens that a layer keeps, int64 `[rows, kv_heads, slots]`, -1 for a free slot."""
        return self.session.ordinals(layer)

    def feed(self, ids: Tensor, position_ids: Tensor | None, valid: Tensor | None, all_logits: bool) -> Tensor:
        """Prefill a prompt, a chunk of one, or a turn; see `Session.feed`."""
        return self.session.feed(ids, position_ids, valid, all_logits)

    def step(self, ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Decode one token a row; see `Session.step`."""
        return self.session.step(ids, position_ids)

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        self.session.reset()

    def reset_rows(self, rows: Sequence[int]) -> None:
        """Forget the tokens of some rows of a batch, so that they can be filled again while the others go on.

        Feed the new prompts with `llm(ids, attention_mask=..., past_key_values=session)`, the mask 0 in all other rows.
        """
        self.session.reset(rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation's cache to a safetensors file."""
        save_session(self.session, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a cache that `save` wrote for the same model, budgets and batch size.

        Raises:
            SessionError, FileFormatError: see `load_session`; the session is then as it was.
        """
        load_session(self.session, path)

    def fork(self) -> SessionCache:
        """An independent session with the same history."""
        twin = SessionCache.__new__(SessionCache)
        Cache.__init__(twin, layers=[])
        twin.session = self.session.fork()
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow the beams that were chosen."""
        self.session.reorder(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise SessionError("a budgeted cache cannot be cropped: evicted tokens are gone; fork the session beforehand")

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_dynamo_compiling():  # an error that is raised here would break the graph and be lost
            return torch.ops.xkv.refused(key_states, FOREIGN_CACHE), value_states
        raise SessionError("this session belongs to a transformed model; pass it to llm.generate, not to another model")
