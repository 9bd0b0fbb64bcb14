"""A transformed plain module: graphs, sessions, and a plain greedy or sampling `generate`."""

from __future__ import annotations

import torch
from torch import Tensor

from xkv_fx.lowering.budgeted import Budgeted
from xkv_fx.runtime.choose_tokens import token_chooser
from xkv_fx.runtime.decode_steps import generate_tokens
from xkv_fx.runtime.session import Session


class BudgetedModule(Budgeted):
    """What `xkv_fx.transform(module, budgets, example_inputs=...)` returns."""

    def new_session(self) -> Session:
        """An empty session; feed it prompts and turns with `feed`, decoded tokens with `step`."""
        return Session(self.program)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits `[rows, S, vocabulary]` of a prompt, in a session of its own that is thrown away."""
        valid = None if attention_mask is None else attention_mask != 0
        return self.new_session().feed(input_ids, valid=valid, all_logits=True)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        session: Session | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """Feed a prompt or a turn, and decode behind it.

        Args:
            input_ids: int64 `[rows, S]`, the new tokens.
            max_new_tokens: how many are decoded at most, at least 1.
            attention_mask: `[rows, S]`, 0 for padding before or after a row's tokens.
            session: one of this module's, to go on with; a new one when None. The last token that is returned has not
                been fed to it.
            do_sample: draw from the distribution instead of taking the likeliest token.
            temperature, top_k, top_p: of that distribution.
            eos_token_id: a row is over once it has this token, and is filled up with it.
            generator: of the random numbers.

        Returns:
            int64 `[rows, S + new]`.

        Raises:
            PromptError: an argument out of its range, or as `Session.feed`.
            CapacityError, SessionError: as `Session.feed` and `Session.check_owner`.
        """
        choose = token_chooser(do_sample, temperature, top_k, generator, top_p)
        if session is None:
            session = self.new_session()
        session.check_owner(self.program)
        return generate_tokens(
            session,
            input_ids,
            max_new_tokens,
            attention_mask,
            choose,
            end_tokens=() if eos_token_id is None else (eos_token_id,),
            pad_token=0 if eos_token_id is None else eos_token_id,
        )
