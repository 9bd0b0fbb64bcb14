"""Layers that mix tokens by a state, in graphs of prompts that run without the model's code: a loop over the tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.fx import GraphModule

from xkv_fx.errors import PassError
from xkv_fx.lowering.lift_weights import lift_weights
from xkv_fx.passes.tools.graph import share_weight
from xkv_fx.runtime.recurrence import PromptCall


def with_token_loops(module: GraphModule) -> GraphModule:
    """A copy of a graph in which loops over the tokens stand for the layers' own code. Weights are shared.

    recurrence_of_prompt(kept, fed, *inputs, *states)  ->  token_loop(kept, fed, *inputs, *states, *weights)
    """
    module = GraphModule(module, copy.deepcopy(module.graph))
    graph = module.graph
    for node in [node for node in graph.nodes if isinstance(node.target, PromptCall)]:
        loop = TokenLoop(node.target)
        with graph.inserting_before(node):
            weights = [share_weight(module, f"{node.name}_{name}", weight) for name, weight in loop.weights.items()]
        node.args, node.target = (*node.args, *weights), loop
    module.recompile()
    return module


class TokenLoop:
    """As a `PromptCall`, by the layer's graph of one token, so that it can be traced for every length.

    Attributes:
        weights: by name, what it is called with behind the states.
    """

    __name__: ClassVar[str] = "token_loop"

    def __init__(self, call: PromptCall) -> None:
        if call.recurrence.step is None:
            raise PassError(f"{call.recurrence.path} was captured without its graph of one token")
        self._call = call
        self._step, self.weights = lift_weights(call.recurrence.step)

    def __call__(self, kept: Tensor, fed: Tensor, *given: Tensor) -> Tensor:
        weights = given[len(given) - len(self.weights) :]
        inputs, held = self._call.split(given[: len(given) - len(self.weights)])
        rows, tokens = inputs[0].shape[:2]
        count, step = len(held), self._step

        def unfinished(place: Tensor, out: Tensor, *states: Tensor) -> Tensor:
            more: Tensor = place < tokens
            return more

        def add_token(place: Tensor, out: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            at = place.reshape(1)
            token = [part.index_select(1, at) for part in inputs]
            made, *new = step(*weights, *token, *states[:count])
            now = _where(place < fed, new, states[:count])
            saved = _where(place < kept, new, states[count:])
            made = torch.where((place < fed)[:, None, None], made, torch.zeros_like(made))
            return place + 1, out.index_copy(1, at, made), *now, *saved

        start = [torch.zeros_like(state) if self._call.fresh else state.clone() for state in held]
        out = inputs[0].new_zeros((rows, tokens, self._call.recurrence.width))
        place = torch.zeros((), dtype=torch.int64, device=out.device)
        carried = (place, out, *start, *(state.clone() for state in start))
        made: tuple[Tensor, ...] = while_loop(unfinished, add_token, carried)
        for state, new in zip(held, made[2 + count :], strict=True):
            state.copy_(new)
        return made[1]


def _where(rows: Tensor, new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """The new states of some rows, and the old ones of the others."""
    return [
        torch.where(rows.view(-1, *(1,) * (one.dim() - 1)), one, other) for one, other in zip(new, old, strict=True)
    ]
