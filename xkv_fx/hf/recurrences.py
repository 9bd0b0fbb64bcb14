"""Layers of a transformers model that mix tokens by a state of fixed size: recurrent ones, linear attention,
convolutions.

transformers keeps these states in cache layers of one kind, whatever the model. So a model's layers are found by
running a copy of it once with its own cache and looking which modules fill these states. In the copy each such module
is replaced by one that `torch.export` sees as a single op; the module itself runs as it is, on a cache of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from xkv_fx.capture.check import tolerance
from xkv_fx.capture.export import export_step, refusing
from xkv_fx.errors import UnsupportedModelError
from xkv_fx.hf.cache_name import CACHE_NAME
from xkv_fx.hf.inspect import TransformersFacts, layer_kinds
from xkv_fx.hf.recurrent_module import CONV, PROBED, RECURRENT, LoneModule, OneStep, Place, StatefulCall, tensors_in
from xkv_fx.passes.prepare.return_states import ReturnStates
from xkv_fx.runtime.recurrence import Recurrence, StatePart

_WITHOUT_STATE = {"mlp", "moe"}
"""Kinds of layers that keep nothing; before 5.23 their cache layers are those of recurrent ones."""
_CHECKED = 7
"""Tokens that modules are checked with."""


@dataclasses.dataclass(frozen=True)
class Recurrences:
    """What was found in a model.

    Attributes:
        found: the layers that mix tokens by a state, in execution order.
        attentions: how many cache layers hold keys and values.
    """

    found: tuple[Recurrence, ...] = ()
    attentions: int = 0


def keeps_states(model: PreTrainedModel) -> bool:
    """Whether transformers' own cache for a model has layers for recurrent or convolution states."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=model.config).layers)


def attends(model: PreTrainedModel) -> bool:
    """Whether transformers' own cache for a model has layers for keys and values."""
    return any(isinstance(layer, CacheLayerMixin) for layer in DynamicCache(config=model.config).layers)


def replace_recurrences(twin: PreTrainedModel, facts: TransformersFacts) -> Recurrences:
    """Replace the layers of a copy of a model that mix tokens by a state; see `Recurrence`. They have no `step` yet.

    Args:
        twin: its attention is "xkv".

    Raises:
        UnsupportedModelError: a state that is kept elsewhere than in transformers' cache, or that more than the last
            tokens' state decides.
    """
    with refusing(facts.name), torch.no_grad():
        calls, cache = _watch(twin, facts)
        found = []
        for index, call in enumerate(calls):
            recurrence = _recurrence_of(twin, facts, index, call, cache)
            twin.set_submodule(call.path, _Opaque(recurrence, call))
            found.append(recurrence)
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return Recurrences(tuple(found), len(held))


def with_step(recurrence: Recurrence, rows: int) -> Recurrence:
    """The same layer with the graph of one token for so many rows."""
    module: Any = recurrence.module
    inputs = tuple(part.expand(rows, *part.shape[1:]).contiguous() for part in module.example)
    states = recurrence.empty_states(rows, inputs[0].device)
    step = export_step(OneStep(module, len(inputs)), (*inputs, *states))
    ReturnStates()(step)
    return dataclasses.replace(recurrence, step=step)


def _watch(twin: PreTrainedModel, facts: TransformersFacts) -> tuple[list[StatefulCall], Any]:
    """Run a model on a few tokens with transformers' cache, and note which modules fill its states: the innermost that
    were running then."""
    cache: Any = DynamicCache(config=twin.config)
    open_calls: list[set[Place]] = []
    claimed: set[Place] = set()
    calls: list[StatefulCall] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        open_calls.append(_filled(cache))

    def after(path: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            new = _filled(cache) - open_calls.pop() - claimed
            if new:
                claimed.update(new)
                calls.append(StatefulCall(path, (args, kwargs), output, tuple(sorted(new))))

        return note

    handles = []
    for path, module in twin.named_modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after(path), with_kwargs=True))
    ids = torch.zeros(1, PROBED, dtype=torch.int64, device=facts.device)
    try:
        twin(input_ids=ids, position_ids=torch.arange(PROBED, device=facts.device)[None], use_cache=True,
             return_dict=True, **{CACHE_NAME: cache})  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    _check_places(twin, calls, cache)
    return calls, cache


def _filled(cache: Any) -> set[Place]:
    return {
        (index, kind, number)
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, LinearAttentionCacheLayerMixin)
        for kind, filled in (
            (CONV, layer.is_conv_states_initialized),
            (RECURRENT, layer.is_recurrent_states_initialized),
        )
        for number, done in filled.items()
        if done
    }


def _check_places(twin: PreTrainedModel, calls: Sequence[StatefulCall], cache: Any) -> None:
    """Each module has a cache layer of its own, and each cache layer for states is some module's."""
    layers = [sorted({layer for layer, _, _ in call.places}) for call in calls]
    paths = [call.path for call in calls]
    kinds = dict(enumerate(layer_kinds(twin)))
    expected = [
        index
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, LinearAttentionCacheLayerMixin) and kinds.get(index) not in _WITHOUT_STATE
    ]
    if sorted(layers) != [[layer] for layer in expected] or len(set(paths)) != len(paths):
        raise UnsupportedModelError(
            f"transformers' cache has states for the layers {expected}, and {len(paths)} modules fill those of "
            f"{sorted(layer for found in layers for layer in found)}; it keeps its recurrent states in another place"
        )


def _recurrence_of(twin: nn.Module, facts: TransformersFacts, index: int, call: StatefulCall, cache: Any) -> Recurrence:
    module = LoneModule(twin.get_submodule(call.path), call)
    layer = cache.layers[module.layer]
    parts = []
    for _, kind, number in call.places:
        state = (layer.conv_states if kind == CONV else layer.recurrent_states)[number]
        parts.append(StatePart(f"{kind}{number or ''}", tuple(state.shape[1:]), state.dtype))
    width = sum(leaf[0, 0].numel() for leaf in tensors_in(call.output))
    return _checked(Recurrence(index, call.path, module, tuple(parts), width), facts.dtype)


def _checked(recurrence: Recurrence, dtype: torch.dtype) -> Recurrence:
    """Compare a prompt that is given whole with one in pieces: the state must be all that is kept, an empty one must be
    zero, and whether several tokens may follow a state is found out.

    Raises:
        UnsupportedModelError: the state is not all that is kept, or does not start from zero.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, _CHECKED, *part.shape[2:], generator=generator).to(part)
        for part in recurrence.module.example  # type: ignore[union-attr]
    ]
    first, rest = [part[:, :3] for part in inputs], [part[:, 3:] for part in inputs]
    whole, _ = recurrence.begin(inputs)
    begun, states = recurrence.begin(first)
    empty = recurrence.empty_states(1, whole.device)
    limit = tolerance(dtype)
    for goes_on in (True, False):
        tried = dataclasses.replace(recurrence, goes_on=goes_on)
        again, later = tried.go_on(first, empty)
        pieces = torch.cat((begun, tried.go_on(rest, states)[0]), 1)
        same = [(pieces, whole), (again, begun), *zip(later, states, strict=True)]
        if all(_error(one, other) <= limit for one, other in same):
            return tried
    raise UnsupportedModelError(
        f"{recurrence.path} gives something else for tokens in pieces than for all at once; it keeps more of earlier "
        "tokens than transformers' cache says, or does not start from zero"
    )


def _error(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1.0))


class _Opaque(nn.Module):
    """What stands in a copy of a model for a layer that mixes tokens by a state: a single op while the copy is
    exported, otherwise the layer itself, for a whole prompt."""

    def __init__(self, recurrence: Recurrence, call: StatefulCall) -> None:
        super().__init__()
        self._recurrence = recurrence
        self._count = len(recurrence.module.example)  # type: ignore[arg-type]
        leaves, self._form = pytree.tree_flatten(call.output)
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._tails = [leaf.shape[2:] if isinstance(leaf, Tensor) else None for leaf in leaves]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = tensors_in((args, kwargs))
        if len(inputs) != self._count:
            raise UnsupportedModelError(
                f"{self._recurrence.path} is given {len(inputs)} tensors without a cache, and {self._count} with one"
            )
        if torch.compiler.is_exporting():
            made = torch.ops.xkv.recurrence(inputs, self._recurrence.index, self._recurrence.width)
        else:
            made = self._recurrence(*inputs)
        parts = iter(made.split([tail.numel() for tail in self._tails if tail is not None], 2))
        leaves = [
            leaf if tail is None else next(parts).unflatten(2, tail) if len(tail) > 1 else next(parts)
            for leaf, tail in zip(self._leaves, self._tails, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._form)
