"""What every transformed model has, whatever generates with it: the plan, the graphs and the bytes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from xkv_fx.budgets import Plan
from xkv_fx.errors import BackendError, SessionError
from xkv_fx.layers import LayerSpec
from xkv_fx.lowering.program import CompiledProgram, compile_program
from xkv_fx.passes.pipeline import PassStep
from xkv_fx.runtime.choose_tokens import token_chooser
from xkv_fx.runtime.decode_steps import decode_steps
from xkv_fx.runtime.session import Session
from xkv_fx.runtime.state import GRAPH_KINDS, GraphKind


class Budgeted(nn.Module):
    """A transformed model. It shares the weights of the model that it was made from.

    Attributes:
        budgets: the plan it was made with.
        layers: what each layer caches, in execution order, all of its KV heads together.
        program: the graphs and what they were lowered to.
    """

    def __init__(self, budgets: Plan, program: CompiledProgram) -> None:
        super().__init__()
        self.budgets = budgets
        self.program = program
        self.layers: tuple[LayerSpec, ...] = program.plan.layers
        self.eval()

    @property
    def prefill(self) -> GraphModule:
        """`(input_ids, position_ids, valid, *state)` -> logits `[rows, 1, vocabulary]` of each last valid token."""
        return self.program.graphs.prefill

    @property
    def extend(self) -> GraphModule:
        """As `prefill`, going on from what the state holds."""
        return self.program.graphs.extend

    @property
    def decode(self) -> GraphModule:
        """`(input_ids, position_ids, *state)` -> logits `[rows, 1, vocabulary]`."""
        return self.program.graphs.decode

    def passes(self, kind: GraphKind = "decode") -> tuple[PassStep, ...]:
        """The passes that made a graph, run again one by one: what each did, how long it took, and the graph after it.

        Args:
            kind: `"prefill"`, `"extend"` or `"decode"`.

        Raises:
            BackendError: another kind.
        """
        if kind not in GRAPH_KINDS:
            raise BackendError(f"there is no {kind!r} graph; choose one of {', '.join(GRAPH_KINDS)}")
        return self.program.graphs.steps(kind)

    @property
    def device(self) -> torch.device:
        return self.program.plan.device

    @property
    def dtype(self) -> torch.dtype:
        return self.program.plan.dtype

    @property
    def kv_bytes(self) -> int:
        """Bytes of K/V that each session allocates."""
        return self.program.plan.kv_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of positions, scores and counters that each session allocates."""
        return self.program.plan.state_bytes

    @property
    def other_state_bytes(self) -> int:
        """Bytes of recurrent and convolution states that each session allocates; no budget changes them."""
        return self.program.plan.other_state_bytes

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a row when an engine of this model generates."""
        return ()

    @property
    def pad_token(self) -> int:
        """The token that fills rows which have ended."""
        return 0

    def with_budgets(
        self, budgets: Plan, backend: str | None = None, max_new_tokens: int = 0, over_limit: bool = False
    ) -> Self:
        """The same captured model under another plan, sharing weights; `transform` without capturing again.

        Args:
            backend: this model's own when None.
            max_new_tokens, over_limit: as in `transform`.

        Raises:
            BudgetError, ModelMismatchError, BackendError: as `transform`.
        """
        backend = self.program.backend if backend is None else backend
        captured = self.program.graphs.captured
        return self._remade(budgets, compile_program(captured, budgets, backend, max_new_tokens, over_limit))

    @torch.no_grad()
    def decode_steps(
        self,
        n: int,
        session: Any,
        ids: Tensor,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        end_tokens: Collection[int] = (),
        pad_token: int = 0,
        top_p: float | None = None,
    ) -> Tensor:
        """Decode `n` tokens a row behind what a session holds, without the work of `generate` between two tokens.

        Args:
            session: one of this model's that has been fed a prompt.
            ids: int64 `[rows, 1]`, the token of each row that is fed first: the one chosen after the prompt.
            do_sample: draw from the distribution instead of taking the likeliest token.
            temperature, top_k, top_p: of that distribution.
            generator: of the random numbers.
            end_tokens: a row is over once it has one of these, and is filled up with `pad_token`; decoding ends when
                all rows are over. Without any, nothing waits for the device.

        Returns:
            the tokens behind `ids`, int64 `[rows, n]` or fewer columns. The last one has not been fed, so that
            `decode_steps(n, session, tokens[:, -1:])` goes on.

        Raises:
            PromptError: an argument out of its range, or as `Session.step`.
            CapacityError: more tokens than there is room for; none has been fed then.
            SessionError: a session of another model, or none of ours.
        """
        inner = getattr(session, "session", session)
        if not isinstance(inner, Session):
            raise SessionError(f"a {type(session).__name__} is no session; take one from llm.new_session()")
        inner.check_owner(self.program)
        choose = token_chooser(do_sample, temperature, top_k, generator, top_p)
        return decode_steps(inner, ids, n, choose, end_tokens, pad_token)

    def describe(self) -> str:
        """Layers, capacities, policy, lowering and every choice that was made, as text."""
        return self.program.describe(self.budgets)

    def _remade(self, budgets: Plan, program: CompiledProgram) -> Self:
        return type(self)(budgets, program)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        raise BackendError("the graphs are made for one device and dtype; move or cast the model, then transform it")
