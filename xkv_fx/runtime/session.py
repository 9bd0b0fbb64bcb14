"""A session: the state of one conversation (or one batch of them), fed through a program's graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from xkv_fx.errors import CapacityError, PromptError, SessionError
from xkv_fx.runtime.state import CachePlan, State

Graph = Callable[..., Tensor]
Kind = Literal["prefill", "extend", "decode"]
"""The graphs of a program."""
KINDS: tuple[Kind, ...] = get_args(Kind)
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
    def key(self) -> str:
        """Identifies model, plan and batch size; a saved session fits programs of the same key."""
        ...

    def prefill(self, all_logits: bool) -> Graph: ...

    def extend(self, all_logits: bool) -> Graph: ...

    def decode(self) -> Graph: ...


class Session:
    """Owns a state and feeds tokens to it. Sessions of one program are independent of each other.

    Attributes:
        program: the graphs.
        state: the tensors.
        seen: valid tokens that each row has seen.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.state: State = program.plan.allocate()
        self.seen: tuple[int, ...] = (0,) * program.plan.rows
        self._base = self.seen  # of each row, when its last prefill ended
        self._steps_left = self._count_steps_left()

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
            PromptError: a wrong shape, no columns, padding between tokens, or more tokens than the model has positions.
            CapacityError: more tokens than the plan holds, under a policy that may not evict.
        """
        self._check_ids(ids, position_ids)
        if valid is None:
            valid = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        added = self._check_valid(valid, ids)
        total = tuple(before + new for before, new in zip(self.seen, added, strict=True))
        self._check_room(max(total))
        if position_ids is None:
            position_ids = (self.state["seen"][:, None] + valid.long().cumsum(1) - 1).clamp(min=0)
        graph = self.program.extend(all_logits) if any(self.seen) else self.program.prefill(all_logits)
        inputs = (tensor.contiguous() for tensor in (ids, position_ids, valid))
        logits = graph(*inputs, *self.state.tensors)
        self._base = tuple(
            after if new else before for before, after, new in zip(self._base, total, added, strict=True)
        )
        self.seen = total
        self._steps_left = self._count_steps_left()
        return logits

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
        if ids.shape[1] != 1:
            raise PromptError(f"decode takes one token a row, not {ids.shape[1]}; feed a prompt or a turn instead")
        if self._steps_left < 1:
            self._refuse_step()
        if position_ids is None:
            position_ids = self.state["seen"][:, None].clone()
        # compiled code reads its inputs by the strides that it was compiled for
        logits = self.program.decode()(ids.contiguous(), position_ids.contiguous(), *self.state.tensors)
        self.seen = tuple(count + 1 for count in self.seen)
        self._steps_left -= 1
        return logits

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget every token, or those of some rows, which may then be filled again while the others go on.

        To fill a row again, feed its prompt with `valid` False in all other rows.

        Raises:
            PromptError: a row that does not exist.
        """
        chosen = range(self.program.plan.rows) if rows is None else rows
        wrong = [row for row in chosen if not 0 <= row < self.program.plan.rows]
        if wrong:
            raise PromptError(f"there is no row {wrong[0]}; this session has {self.program.plan.rows} rows")
        self.state.reset(rows)
        self.seen = tuple(0 if row in chosen else count for row, count in enumerate(self.seen))
        self._base = tuple(0 if row in chosen else count for row, count in enumerate(self._base))
        self._steps_left = self._count_steps_left()

    def fork(self) -> Session:
        """An independent session with the same history, for several continuations of one prefix."""
        twin = copy.copy(self)
        twin.state = self.state.clone()
        return twin

    def reorder(self, rows: Tensor) -> None:
        """Make row i a copy of row `rows[i]`, as beam search does."""
        self.state.reorder(rows)
        chosen = rows.tolist()
        self.seen = tuple(self.seen[row] for row in chosen)
        self._base = tuple(self._base[row] for row in chosen)
        self._steps_left = self._count_steps_left()

    def restore(self, state: State) -> None:
        """Take over the content of another state of the same plan; the buffers stay."""
        for tensor, content in zip(self.state.tensors, state.tensors, strict=True):
            tensor.copy_(content)
        self.seen = tuple(state["seen"].tolist())
        self._base = tuple(state["base"].tolist())
        self._steps_left = self._count_steps_left()

    def check_owner(self, program: Program) -> None:
        """Raise SessionError unless this session belongs to `program`."""
        if self.program is not program:
            raise SessionError("this session belongs to another transformed model; take one from llm.new_session()")

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
        if valid.shape != ids.shape or valid.dtype != torch.bool:
            raise PromptError(
                f"valid must be bool of the ids' shape {list(ids.shape)}; got {valid.dtype} of {list(valid.shape)}"
            )
        starts = (valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, 0].long()
        if bool((starts > 1).any()):
            raise PromptError(
                "the attention mask has holes: padding may stand before or after a row's tokens, not between them"
            )
        return tuple(valid.sum(1).tolist())

    def _check_room(self, longest: int) -> None:
        """Check that a prefill may take the longest row to so many tokens."""
        limit = self.program.max_positions
        if limit is not None and longest > limit:
            raise PromptError(f"{longest} tokens are more than the model's {limit} positions; shorten the prompt")
        for layer, plan in enumerate(self.program.plan.slots):
            if plan.eviction == "none" and longest > plan.slots:
                raise CapacityError(
                    f"{longest} tokens do not fit into the {plan.slots} slots of layer {layer}, and full budgets never "
                    "evict; plan larger budgets, or choose an eviction policy"
                )

    def _count_steps_left(self) -> int:
        """How many tokens a row may decode before one of the limits that `_refuse_step` names is met."""
        limit = self.program.max_positions
        left = [_UNLIMITED if limit is None else limit - max(self.seen)]
        for plan in dict.fromkeys(self.program.plan.slots):
            if plan.eviction == "none":
                left.append(plan.slots - max(self.seen))
            elif plan.eviction == "append" and not plan.takes_turns:
                rows = zip(self.seen, self._base, strict=True)
                left.append(plan.slots - max(min(base, plan.capacity) + seen - base for seen, base in rows))
        return min(left)

    def _refuse_step(self) -> None:
        self._check_room(max(self.seen) + 1)
        plan = next(plan for plan in self.program.plan.slots if plan.eviction == "append" and not plan.takes_turns)
        raise CapacityError(
            f"the room for {plan.slots - plan.capacity} appended tokens that was set aside is used up; transform with "
            "a larger max_new_tokens, or choose eviction='ring'"
        )


def refuse_rows_of_padding(mask: Tensor | None) -> None:
    """Raise PromptError if a row of a prompt's mask `[rows, S]`, 0 for padding, has no token; an empty prompt, of no
    columns at all, is refused where it is fed."""
    if mask is not None and mask.shape[-1] > 0 and not bool((mask != 0).any(-1).all()):
        raise PromptError("a row of the prompt is nothing but padding; give every row at least one token")
