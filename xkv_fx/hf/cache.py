"""The session that `generate` sees: a transformers `Cache` around a runtime session."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from xkv_fx.errors import PromptError, SessionError
from xkv_fx.runtime.session import Program, Session, refuse_pickling
from xkv_fx.runtime.session_file import load_session, save_session
from xkv_fx.runtime.tracing_marks import FOREIGN_CACHE


class SessionCache(Cache):
    """One conversation, or one batch of them, with K/V buffers of exactly the planned size.

    Take one from `llm.new_session()` and pass it as `past_key_values`, with the whole conversation each time, as
    transformers' own caches are used. Whatever those offer that makes no sense here raises SessionError: no method of
    `Cache` silently does nothing.
    """

    is_compileable = False
    is_croppable = False
    is_initialized = True
    offloading = False
    layer_class_to_replicate = None

    def __init__(self, program: Program) -> None:
        self._hold(Session(program))  # not Cache.__init__, which makes layers

    def _hold(self, session: Session) -> None:
        self.session = session
        self._windows = tuple(spec.sliding_window is not None for spec in session.program.plan.layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self)}, fed={self.fed}, kv_bytes={self.kv_bytes})"

    def __len__(self) -> int:
        """Layers that own a cache."""
        return len(self._windows)

    @property
    def fed(self) -> int:
        """Tokens fed so far per row, padding included; transformers slices the conversation by this number."""
        return self.session.history.fed

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens a row fed so far, evicted ones and padding included."""
        return self.fed

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.session.program.plan.rows

    @property
    def max_batch_size(self) -> int:
        """`batch_size`, as older versions of transformers call it."""
        return self.batch_size

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """How many tokens a row may come to where none may be evicted. Otherwise -1, which in transformers means no
        maximum: a conversation may be longer than what is held of it."""
        plan = self.session.program.plan
        chosen = plan.caches if layer_idx is None else plan.caches_of(layer_idx)
        return min((cache.slots.slots for cache in chosen if cache.slots.eviction == "none"), default=-1)

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """`get_max_length`, as older versions of transformers call it."""
        return self.get_max_length(layer_idx)

    @property
    def max_cache_len(self) -> int:
        """`get_max_length()`, as older versions of transformers call it."""
        return self.get_max_length()

    @property
    def is_sliding(self) -> list[bool]:
        """For each layer, whether it has a sliding window."""
        return list(self._windows)

    @property
    def is_linear(self) -> list[bool]:
        """All False, for each layer that owns a cache. If all were true, as in an empty list, transformers would feed
        the whole conversation again."""
        return [False] * len(self._windows)

    @property
    def is_dummy(self) -> list[bool]:
        """For each layer, whether it holds nothing."""
        return [False] * len(self._windows)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether evicted tokens could be brought back."""
        return False

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for K/V."""
        return self.session.state.kv_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes allocated for positions and counters."""
        return self.session.state.state_bytes

    @property
    def other_state_bytes(self) -> int:
        """Bytes allocated for recurrent and convolution states."""
        return self.session.state.other_state_bytes

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
        """An independent session with the same history. `copy.copy` and `copy.deepcopy` make one too."""
        twin = SessionCache.__new__(SessionCache)
        twin._hold(self.session.fork())
        return twin

    def __copy__(self) -> SessionCache:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> SessionCache:
        memo[id(self)] = twin = self.fork()
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickling()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow the beams that were chosen."""
        self.session.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes a copy of row `indices[i]`; a session keeps its number of rows.

        Raises:
            PromptError: another number of rows, or a row that does not exist.
        """
        try:
            rows = torch.arange(self.batch_size)[indices.cpu()]
        except IndexError as error:
            raise PromptError(f"there are {self.batch_size} rows in this session ({error})") from error
        self.session.reorder(rows)

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        raise SessionError(
            f"a session has as many rows as its model was transformed for, here {self.batch_size}; transform with "
            f"batch_size={self.batch_size * repeats} and feed each row as often as it is to be continued, or fork it"
        )

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise SessionError("a budgeted cache cannot be cropped: evicted tokens are gone; fork the session beforehand")

    def activate_past_recording(self) -> NoReturn:
        raise SessionError("evicted tokens are gone, and are not recorded; fork the session beforehand")

    @property
    def layers(self) -> NoReturn:  # type: ignore[override]  # a list, which would be empty
        raise SessionError(
            "a session has no layers of transformers' kind; kept_positions(layer) says what a layer holds, and "
            "session.session.state has the tensors"
        )

    def early_initialization(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise SessionError(
            "a session is allocated from the start, by its plan; transform with another plan to change it"
        )

    def offload(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise SessionError("a session stays on its model's device; its memory is set by the budgets. save() writes it")

    def prefetch(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise SessionError("a session stays on its model's device; there is nothing to fetch")

    def has_previous_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse_states("recurrent or convolution state")

    def get_conv_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse_states("recurrent or convolution state")

    def update_conv_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse_states("recurrent or convolution state")

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse_states("recurrent or convolution state")

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse_states("recurrent or convolution state")

    def update_indexer(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse_states("indexer")

    def _refuse_states(self, what: str) -> NoReturn:
        raise SessionError(f"a session hands out no {what}; what its layers keep is in session.session.state")

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """`fed`."""
        return self.fed

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if torch.compiler.is_dynamo_compiling():  # an error that is raised here would break the graph and be lost
            return query_length, 0
        self._refuse_other_model()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_dynamo_compiling():
            return torch.ops.xkv.refused(key_states, FOREIGN_CACHE), value_states
        self._refuse_other_model()

    def _refuse_other_model(self) -> NoReturn:
        raise SessionError("this session belongs to a transformed model; pass it to llm.generate, not to another model")
