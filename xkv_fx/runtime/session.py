"""A session: the state of one conversation (or one batch of them), fed through a program's graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from xkv_fx.errors import CapacityError, PromptError, SessionError
from xkv_fx.runtime.history import History, Transcript
from xkv_fx.runtime.reading import Reading
from xkv_fx.runtime.slots import EMPTY
from xkv_fx.runtime.state import CachePlan, GraphKind, State

Graph = Callable[..., Tensor]
_UNLIMITED = 2**62


class Program(Protocol):
    """Compiled graphs over one cache plan, shared by every session.

    `prefill` and `extend` are called as `(ids, position_ids, valid, *state)`, `decode` without `valid`; each
    returns logits and mutates the state.
    """

    @property
    def plan(self) -> CachePlan: ...

    @property
    def max_positions(self) -> int | None: ...

    @property
    def known_tokens(self) -> int:
        """Token ids below this are those that the model has."""
        ...

    @property
    def key(self) -> str:
        """Identifies model, plan and batch size; a saved session fits programs of the same key."""
        ...

    def prefill(self, all_logits: bool) -> Graph: ...

    def extend(self, all_logits: bool) -> Graph: ...

    def decode(self) -> Graph: ...


@dataclasses.dataclass(frozen=True)
class Feeding:
    """A prompt or a turn that was checked, and is about to be fed.

    Attributes:
        kind: which graph takes it.
        ids, position_ids: int64 `[rows, S]`.
        valid: bool `[rows, S]`, False for padding.
        after: what the rows will have been fed then.
        twice: what the graph takes instead where prompts are read again: ids, positions and mask of both readings.
    """

    kind: GraphKind
    ids: Tensor
    position_ids: Tensor
    valid: Tensor
    after: History
    twice: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the graph takes in front of the state."""
        return (self.ids, self.position_ids, self.valid) if self.twice is None else self.twice


class Session:
    """Owns a state and feeds tokens to it. Sessions of one program are independent of each other.

    Attributes:
        program: the graphs.
        state: the tensors.
        history: how much the rows have been fed.
        transcript: what that was.
    """

    history: History
    _steps_left: int

    def __init__(self, program: Program) -> None:
        self.program = program
        with torch.inference_mode(False):  # where what is allocated could not be changed outside of it
            self.state: State = program.plan.allocate()
        self.transcript = Transcript(program.plan.rows, program.plan.device)
        self._remember(History.empty(program.plan.rows))

    @property
    def seen(self) -> tuple[int, ...]:
        """Valid tokens that each row has seen."""
        return self.history.seen

    def feed(
        self,
        ids: Tensor,
        position_ids: Tensor | None = None,
        valid: Tensor | None = None,
        all_logits: bool = False,
    ) -> Tensor:
        """Prefill S >= 1 tokens a row, after which survivors are chosen.

        Args:
            ids: int64 `[rows, S]`.
            position_ids: int64 `[rows, S]`; counted on from the valid tokens seen when None.
            valid: bool `[rows, S]`, False for padding, which may stand before or after the tokens of a row. A row that
                is padding throughout stays as it is, and its logits mean nothing.
            all_logits: return the logits of every token instead of each row's last valid one.

        Returns:
            logits `[rows, 1 or S, vocabulary]`.

        Raises:
            PromptError: a wrong shape, no columns, a token that the model does not have, padding between tokens, or
                more tokens than the model has positions.
            CapacityError: more tokens than the plan holds, under a policy that may not evict.
        """
        reading = self.program.plan.reading
        if reading is not None and ids.dim() == 2 and ids.shape[1] > reading.chunk:
            return self._feed_in_chunks(reading.chunk, ids, position_ids, valid, all_logits)
        feeding = self.begin_feed(ids, position_ids, valid)
        graph = self.program.prefill(all_logits) if feeding.kind == "prefill" else self.program.extend(all_logits)
        logits = graph(*feeding.inputs, *self.state.tensors)
        self.end_feed(feeding)
        return logits[:, : ids.shape[1]] if all_logits else logits

    def _feed_in_chunks(
        self, chunk: int, ids: Tensor, position_ids: Tensor | None, valid: Tensor | None, all_logits: bool
    ) -> Tensor:
        """As `feed`, in pieces of `chunk` columns; nothing is fed where the whole could not be."""
        self._check_feed(ids, position_ids, valid)
        parts: list[Tensor] = []
        for start in range(0, ids.shape[1], chunk):
            part = slice(start, start + chunk)
            positions = None if position_ids is None else position_ids[:, part]
            present = None if valid is None else valid[:, part]
            logits = self.feed(ids[:, part], positions, present, all_logits)
            if not all_logits and parts and present is not None:  # a row may have ended in an earlier piece
                logits = torch.where(present.any(1)[:, None, None], logits, parts.pop())
            parts.append(logits)
        return torch.cat(parts, 1) if all_logits else parts[-1]

    def begin_feed(self, ids: Tensor, position_ids: Tensor | None = None, valid: Tensor | None = None) -> Feeding:
        """What a graph must be given to feed these tokens; the arguments and errors are those of `feed`.

        For whoever runs the graph in parts: behind it, `end_feed` is called with what this returns. Nothing else may be
        fed in between.
        """
        valid, after = self._check_feed(ids, position_ids, valid)
        if position_ids is None:
            position_ids = (self.counts["seen"][:, None] + valid.long().cumsum(1) - 1).clamp(min=0)
        kind: GraphKind = "extend" if any(self.seen) else "prefill"
        twice = None if self.program.plan.reading is None else self._read_twice(self.program.plan.reading, ids, valid)
        return Feeding(kind, ids.contiguous(), position_ids.contiguous(), valid.contiguous(), after, twice)

    def _check_feed(self, ids: Tensor, position_ids: Tensor | None, valid: Tensor | None) -> tuple[Tensor, History]:
        """The padding mask, and what the rows will have been fed; the errors are those of `feed`."""
        self._check_ids(ids, position_ids)
        refuse_unknown_tokens(ids, self.program.known_tokens)
        if valid is None:
            valid = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        added = self._check_valid(valid, ids)
        after = self.history.after_prompt(added, ids.shape[1])
        self._check_prompt(after, added)
        return valid, after

    def _read_twice(self, reading: Reading, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a graph that reads again takes; the second reading stands behind the first one."""
        ids, valid = reading.twice(ids, valid)
        return ids, (self.counts["seen"][:, None] + valid.long().cumsum(1) - 1).clamp(min=0), valid

    def end_feed(self, feeding: Feeding) -> None:
        """Note what was fed, once its graph has run."""
        self.transcript.add(feeding.ids, feeding.valid)
        self._remember(feeding.after)

    def step(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Decode one token a row.

        Args:
            ids: int64 `[rows, 1]`.
            position_ids: int64 `[rows, 1]`; the count of valid tokens seen when None.

        Returns:
            logits `[rows, 1, vocabulary]`.

        Raises:
            as `feed`.
        """
        self._check_ids(ids, position_ids)
        if ids.device.type == "cpu":  # elsewhere each step would wait for the device
            refuse_unknown_tokens(ids, self.program.known_tokens)
        if ids.shape[1] != 1:
            raise PromptError(f"decode takes one token a row, not {ids.shape[1]}; feed a prompt or a turn instead")
        if self._steps_left < 1:
            self._refuse_step(self.history)
        if position_ids is None:
            position_ids = self.counts["seen"][:, None].clone()
        # compiled code reads its inputs by the strides that it was compiled for
        logits = self.program.decode()(ids.contiguous(), position_ids.contiguous(), *self.state.tensors)
        self.transcript.add(ids)
        self.history = self.history.after_steps()
        self._steps_left -= 1
        return logits

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget every token, or those of some rows, which may then be filled again while the others go on.

        To fill a row again, feed its prompt with `valid` False in all other rows.

        Raises:
            PromptError: a row that does not exist.
        """
        self._check_rows(() if rows is None else rows)
        self.state.reset(rows)
        self.transcript.forget(rows)
        self._remember(self.history.without(rows))

    def fork(self) -> Session:
        """An independent session with the same history, for several continuations of one prefix. `copy.copy` and
        `copy.deepcopy` make one too."""
        twin = type(self).__new__(type(self))
        twin.program = self.program
        with torch.inference_mode(False):
            twin.state = self.state.clone()
        twin.transcript = self.transcript.clone()
        twin._remember(self.history)
        return twin

    def __copy__(self) -> Session:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        memo[id(self)] = twin = self.fork()
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickling()

    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row `rows[i]`, as beam search does.

        Raises:
            PromptError: not one index a row, or a row that does not exist.
        """
        chosen = rows.tolist()
        if rows.shape != (self.program.plan.rows,):
            raise PromptError(
                f"rows are chosen by {self.program.plan.rows} numbers, as many as this session has; got {chosen}"
            )
        self._check_rows(chosen)
        self.state.reorder(rows)
        self.transcript.reorder(rows)
        self._remember(self.history.reordered(chosen))

    def restore(self, state: State, fed: int, ids: Tensor | None = None) -> None:
        """Take over the content of another state of the same plan; the buffers stay.

        Args:
            fed: columns that had been fed, padding included.
            ids: int32 `[rows, <= fed]`, the last of these columns, as `Transcript.ids`; None where they are not known.
        """
        for tensor, content in zip(self.state.tensors, state.tensors, strict=True):
            tensor.copy_(content)
        counts = state.of(self.program.plan.counters)
        plan = self.program.plan
        self.transcript = (
            Transcript(plan.rows, plan.device, fed) if ids is None else Transcript.of(ids, fed - ids.shape[1])
        )
        self._remember(History(tuple(counts["seen"].tolist()), tuple(counts["base"].tolist()), fed))

    def check_history(self, ids: Tensor | None, valid: Tensor | None) -> None:
        """Refuse a conversation that does not begin with what this session was fed.

        Args:
            ids: int64 `[rows, >= fed]`, the whole conversation; None where only its mask is known.
            valid: bool `[rows, >= fed]`, False for padding; all are tokens when None.

        Raises:
            SessionError: it begins otherwise; the message names the first column that differs.
        """
        difference = self.transcript.difference(ids, valid)
        if difference is not None:
            raise SessionError(
                f"this session holds another conversation: {difference}. Give the whole conversation each time, what "
                "is new at its end, with the mask that it was fed with; without one, generate takes every padding id "
                "for padding. Rows that ended while others went on were fed padding tokens, which count. For another "
                "conversation, take a new session"
            )

    def check_room(self, wanted: int, ids: Tensor, valid: Tensor | None = None) -> None:
        """Before anything is fed, refuse to feed tokens and generate `wanted` more if `feed` would raise, or one of the
        `wanted - 1` steps after it; the last token is not fed.

        Args:
            ids, valid: as in `feed`.

        Raises:
            PromptError, CapacityError: the message says how many tokens can be generated.
        """
        self._check_ids(ids, None)
        refuse_unknown_tokens(ids, self.program.known_tokens)
        if valid is not None:
            self._check_shape(valid, ids)
        added = [ids.shape[1]] * ids.shape[0] if valid is None else valid.sum(1).tolist()
        after = self.history.after_prompt(added, ids.shape[1])
        self._check_prompt(after, added)
        self._check_steps(after, wanted - 1, wanted)

    def check_steps(self, wanted: int) -> None:
        """Before anything is fed, refuse more steps than `step` would take.

        Raises:
            PromptError, CapacityError: the message says how many it would take.
        """
        self._check_steps(self.history, wanted, wanted)

    def _check_steps(self, history: History, steps: int, wanted: int) -> None:
        left = self._count_steps_left(history)
        if steps <= left:
            return
        try:
            self._refuse_step(history.after_steps(left))
        except (PromptError, CapacityError) as error:
            raise type(error)(
                f"{wanted} new tokens are asked for, and {wanted - steps + left} can be generated from here: {error}"
            ) from error

    @property
    def counts(self) -> dict[str, Tensor]:
        """The counters on the device, int64 `[rows]`: `seen`, and `base`, what the last prompt or turn came to."""
        return self.state.of(self.program.plan.counters)

    def ordinals(self, layer: int) -> Tensor:
        """Which tokens a layer keeps now: int64 `[rows, kv_heads, slots]`, -1 for a free slot, and where a KV head has
        fewer slots than another."""
        caches = self.program.plan.caches_of(layer)
        parts = [cache.ordinals(self.state.of(cache), self.counts) for cache in caches]
        if len(parts) == 1:
            return parts[0]
        heads, most = sum(len(cache.heads) for cache in caches), max(part.shape[2] for part in parts)
        ordinals = parts[0].new_full((parts[0].shape[0], heads, most), EMPTY)
        for cache, part in zip(caches, parts, strict=True):
            ordinals[:, list(cache.heads), : part.shape[2]] = part
        return ordinals

    def check_owner(self, program: Program) -> None:
        """Raise SessionError unless this session belongs to `program`."""
        if self.program is not program:
            raise SessionError("this session belongs to another transformed model; take one from llm.new_session()")

    def _check_rows(self, rows: Sequence[int]) -> None:
        wrong = [row for row in rows if not 0 <= row < self.program.plan.rows]
        if wrong:
            raise PromptError(f"there is no row {wrong[0]}; this session has {self.program.plan.rows} rows")

    def _check_ids(self, ids: Tensor, position_ids: Tensor | None) -> None:
        rows = self.program.plan.rows
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise PromptError(f"ids must be int64 of shape [rows, S]; got {ids.dtype} of shape {list(ids.shape)}")
        if ids.shape[0] != rows:
            raise PromptError(
                f"got {ids.shape[0]} rows, but this program was transformed for batch_size={rows}; pad the batch, or "
                f"transform with batch_size={ids.shape[0]} (rows count beams and return sequences)"
            )
        if ids.shape[1] == 0:
            raise PromptError("the prompt is empty; give at least one token")
        if position_ids is not None and (position_ids.shape != ids.shape or position_ids.dtype != torch.int64):
            raise PromptError(
                f"position_ids must be int64 of the ids' shape {list(ids.shape)}; got {position_ids.dtype} of "
                f"{list(position_ids.shape)}"
            )

    def _check_valid(self, valid: Tensor, ids: Tensor) -> tuple[int, ...]:
        """Check a padding mask; returns the valid tokens that each row gains."""
        self._check_shape(valid, ids)
        starts = (valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, 0].long()
        if bool((starts > 1).any()):
            raise PromptError(
                "the attention mask has holes: padding may stand before or after a row's tokens, not between them"
            )
        return tuple(valid.sum(1).tolist())

    def _check_shape(self, valid: Tensor, ids: Tensor) -> None:
        if valid.shape != ids.shape or valid.dtype != torch.bool:
            raise PromptError(
                f"valid must be bool of the ids' shape {list(ids.shape)}; got {valid.dtype} of {list(valid.shape)}"
            )

    def _check_prompt(self, after: History, added: Sequence[int]) -> None:
        """Check that rows may be fed so many tokens, after which they will have been fed `after`."""
        self._check_room(max(after.seen))
        reading, limit = self.program.plan.reading, self.program.max_positions
        if reading is None or limit is None:
            return
        again = (seen + reading.gap + min(new, reading.chunk) for seen, new in zip(after.seen, added, strict=True))
        last = max(again)
        if last > limit:
            raise PromptError(
                f"the second reading of these tokens would end at position {last}, and the model has {limit}; feed "
                "shorter pieces: set the scorer's option chunk, or prefill_chunk_size"
            )

    def _check_room(self, longest: int) -> None:
        """Check that a prefill may take the longest row to so many tokens."""
        limit = self.program.max_positions
        if limit is not None and longest > limit:
            raise PromptError(f"{longest} tokens are more than the model's {limit} positions; shorten the prompt")
        for state in self.program.plan.states:
            state.refuse_tokens(longest)

    def _remember(self, history: History) -> None:
        self.history = history
        self._steps_left = self._count_steps_left(history)

    def _count_steps_left(self, history: History) -> int:
        """How many tokens a row may decode before one of the limits that `_refuse_step` names is met."""
        limit = self.program.max_positions
        rows = set(zip(history.seen, history.base, strict=True))
        left = [state.steps_left(seen, base) for state in self.program.plan.states for seen, base in rows]
        positions = _UNLIMITED if limit is None else limit - max(history.seen)
        return min((positions, *(steps for steps in left if steps is not None)))

    def _refuse_step(self, history: History) -> None:
        """Say why no further token can be decoded, where there are no steps left."""
        self._check_room(max(history.seen) + 1)
        rows = set(zip(history.seen, history.base, strict=True))
        for state in self.program.plan.states:
            if any(state.steps_left(seen, base) == 0 for seen, base in rows):
                state.refuse_step()


def refuse_rows_of_padding(mask: Tensor | None) -> None:
    """Raise PromptError if a row of a prompt's mask `[rows, S]`, 0 for padding, has no token; an empty prompt, of no
    columns at all, is refused where it is fed."""
    if mask is not None and mask.shape[-1] > 0 and not bool((mask != 0).any(-1).all()):
        raise PromptError("a row of the prompt is nothing but padding; give every row at least one token")


def refuse_unknown_tokens(ids: Tensor, known: int, where: str = "the input") -> None:
    """Raise PromptError if one of the ids is not from 0 to `known` - 1: code would read past the embedding.
    `where` is what the message calls them."""
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= known:
        raise PromptError(
            f"{where} has the token {low if low < 0 else high}, but the model's tokens are 0 to {known - 1}"
        )


def refuse_pickling() -> NoReturn:
    """Raise SessionError: a session shares its program, weights included, with all others."""
    raise SessionError(
        "a session cannot be pickled, since it shares graphs and weights with others; one of llm.new_session() can be "
        "kept in a file by its save(path)"
    )
