"""Checks that a captured graph computes what its model does, and that it can go on from a cache.

The graph may learn about earlier tokens only through its attention. Convolutions and recurrences over tokens, positions
counted from the length, and attention to later tokens all show up when a prompt is fed in pieces and each attention
is given the keys and values of the earlier tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.runtime.recurrence import Recurrence

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Difference of logits, relative to their size, that is allowed between a model and its captured graph."""
LENGTH = 17
PIECES = (9, 14)
INDEX_AT = 6
"""Where the arguments of an indexer begin among those that `xkv::attention` takes behind keys and values."""


def check_capture(
    prompt: GraphModule, token: GraphModule | None, ids: Tensor, expected: Tensor, dtype: torch.dtype
) -> None:
    """Compare a captured graph with its model, and with itself when the prompt comes in pieces.

    Args:
        prompt, token: captured graphs of `(input_ids, position_ids)`; the last tokens go through `token` one by one.
        ids: int64 `[rows, S]`.
        expected: the model's own logits for them, `[rows, S, vocabulary]`.
        dtype: what the model computes in, which may be less exact than its logits.

    Raises:
        UnsupportedModelError: they differ; the message does not name the model.
    """
    limit = tolerance(dtype)
    with torch.no_grad():
        logits = prompt(ids, _positions(ids))
    error = difference(logits, expected, dtype)
    if not error <= limit:
        raise UnsupportedModelError(
            f"the captured graph differs from the model by {error:.2g} of its largest logit (limit {limit:.0e}); its "
            "attention does something that was not captured"
        )
    check_continues(prompt, token, ids[:, :LENGTH], logits[:, :LENGTH], dtype)


def check_continues(
    prompt: GraphModule, token: GraphModule | None, ids: Tensor, whole: Tensor, dtype: torch.dtype
) -> None:
    """Compare a captured graph with itself when the prompt comes in pieces.

    Args:
        prompt, token, dtype: see `check_capture`.
        ids: int64 `[rows, S]`; fewer than 3 tokens make no pieces.
        whole: the graph's logits for them `[rows, S, vocabulary]`, from a prompt that began with them.

    Raises:
        UnsupportedModelError: they differ; the message does not name the model.
    """
    if ids.shape[1] < 3:
        return
    limit = tolerance(dtype)
    error = _continuation_error(prompt, token, ids, whole, dtype)
    if not error <= limit:
        raise UnsupportedModelError(
            f"a prompt fed in pieces gives logits that differ by {error:.2g} of the largest (limit {limit:.0e}); it "
            "keeps something of earlier tokens besides keys and values, or looks at later ones"
        )


def _continuation_error(
    prompt: GraphModule, token: GraphModule | None, ids: Tensor, whole: Tensor, dtype: torch.dtype
) -> float:
    """How far the logits of a prompt fed in pieces are from those of the prompt fed whole, after the first piece.
    The prompt has at least 3 tokens."""
    length = ids.shape[1]
    positions = _positions(ids)
    bounds = [0, *(bound for bound in PIECES if 2 <= bound <= length - 2 and length - bound >= 2)]
    pieces = [(prompt, start, stop) for start, stop in zip(bounds, [*bounds[1:], length], strict=True)]
    if token is not None:
        _, start, stop = pieces.pop()
        pieces += [(token, place, place + 1) for place in range(start, stop)]
    if len(pieces) == 1:  # too short
        return 0.0
    history: dict[int, tuple[Tensor, ...]] = {}
    states: dict[int, tuple[Tensor, ...]] = {}
    with torch.no_grad():
        logits = [
            _Continuing(module, history, states).run(*(part[:, start:stop].contiguous() for part in (ids, positions)))
            for module, start, stop in pieces
        ]
    behind = pieces[0][2]
    return difference(torch.cat(logits[1:], 1), whole[:, behind:], dtype)


def tolerance(dtype: torch.dtype) -> float:
    """The `difference` that is allowed between a model that computes in `dtype` and its captured graph."""
    return TOLERANCE.get(dtype, 1e-2)


def difference(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The largest difference relative to the largest logit. In half precision, where rounding alone is as large as the
    tolerance for a few tokens, the median over tokens, or a fifth of the largest if that is more: a defect changes most
    tokens."""
    expected = expected.float()
    errors = (logits.float() - expected).abs().amax(-1) / expected.abs().max().clamp(min=1.0)
    if dtype in (torch.bfloat16, torch.float16):
        return float(torch.maximum(errors.median(), errors.max() / 5))
    return float(errors.max())


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1).contiguous()


class _Continuing(Interpreter):
    """Runs a graph, with each attention reaching all keys and values that it has been given so far, and each layer that
    mixes tokens by a state going on from it, by its graph of one token where it is given one."""

    def __init__(
        self,
        module: GraphModule,
        history: dict[int, tuple[Tensor, ...]],
        states: dict[int, tuple[Tensor, ...]],
    ) -> None:
        super().__init__(module)
        self.history = history
        self.states = states
        self.calls = 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, Recurrence):
            return self._go_on(target, args)
        if target is not torch.ops.xkv.attention.default:
            return super().call_function(target, args, kwargs)
        q, k, v, *rest = args
        index = rest[INDEX_AT:] or None
        new: tuple[Tensor, ...] = (k, v) if index is None else (k, v, index[1])
        if self.calls in self.history:
            new = tuple(torch.cat(parts, 2) for parts in zip(self.history[self.calls], new, strict=True))
        self.history[self.calls] = new
        self.calls += 1
        earlier = new[0].shape[2] - q.shape[2]
        if index is not None:
            rest[INDEX_AT:] = [_after(index[0], earlier, 2), new[2], _after(index[2], earlier, 1), index[3]]
        attended = super().call_function(target, (_after(q, earlier, 2), *new[:2], *rest), kwargs)
        return attended[:, :, -q.shape[2] :].contiguous()

    def _go_on(self, layer: Recurrence, inputs: tuple[Tensor, ...]) -> Tensor:
        held = self.states.get(layer.index)
        if held is None:
            out, self.states[layer.index] = layer.begin(inputs)
        elif layer.step is not None and inputs[0].shape[1] == 1:
            out, *now = layer.step(*inputs, *held)
            self.states[layer.index] = tuple(now)
        else:
            out, self.states[layer.index] = layer.go_on(inputs, held)
        return out


def _after(values: Tensor, earlier: int, dim: int) -> Tensor:
    """Values of tokens, behind so many zeros for earlier ones."""
    shape = [earlier if axis == dim else size for axis, size in enumerate(values.shape)]
    return torch.cat((values.new_zeros(shape), values), dim)
