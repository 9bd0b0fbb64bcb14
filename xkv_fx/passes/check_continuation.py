"""Whether a captured graph may go on from a cache: it must know nothing of earlier tokens but through its attention.

Convolutions and recurrences over tokens, positions counted from the length, and attention to later tokens all show
here: the tokens of a prompt are fed in pieces, and each attention is given the keys and values of the earlier ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

LENGTH = 17
PIECES = (9, 14)


def continuation_error(prompt: GraphModule, token: GraphModule | None, ids: Tensor) -> float:
    """Largest difference of logits, relative to the largest one, between a prompt fed whole and fed in pieces.

    Args:
        prompt, token: captured graphs of `(input_ids, position_ids)`; the last tokens go through `token` one by one.
        ids: int64 `[rows, S]`, S at least 3.
    """
    rows, length = ids.shape
    positions = torch.arange(length, device=ids.device).expand(rows, -1).contiguous()
    bounds = [0, *(bound for bound in PIECES if 2 <= bound <= length - 2 and length - bound >= 2)]
    pieces = [(prompt, start, stop) for start, stop in zip(bounds, [*bounds[1:], length], strict=True)]
    if token is not None:
        _, start, stop = pieces.pop()
        pieces += [(token, place, place + 1) for place in range(start, stop)]
    history: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        whole = prompt(ids, positions).float()
        logits = [
            _Continuing(module, history).run(ids[:, start:stop].contiguous(), positions[:, start:stop].contiguous())
            for module, start, stop in pieces
        ]
    difference = (torch.cat(logits, 1).float() - whole).abs().max()
    return float(difference / whole.abs().max().clamp(min=1.0))


class _Continuing(Interpreter):
    """Runs a graph with each attention over all that it has been given so far."""

    def __init__(self, module: GraphModule, history: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__(module)
        self.history = history
        self.calls = 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not torch.ops.xkv.attention.default:
            return super().call_function(target, args, kwargs)
        q, k, v, *rest = args
        if self.calls in self.history:
            before = self.history[self.calls]
            k, v = (torch.cat(parts, 2) for parts in zip(before, (k, v), strict=True))
        self.history[self.calls] = (k, v)
        self.calls += 1
        earlier = q.new_zeros(*q.shape[:2], k.shape[2] - q.shape[2], q.shape[3])
        attended = super().call_function(target, (torch.cat((earlier, q), 2), k, v, *rest), kwargs)
        return attended[:, :, -q.shape[2] :].contiguous()
