"""The interface of a scorer, and the names under which policies refer to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from xkv_fx.budgets import Policy
from xkv_fx.errors import BudgetError
from xkv_fx.runtime.scorers.prompt import PromptView
from xkv_fx.runtime.slots import SlotPlan


@runtime_checkable
class Scorer(Protocol):
    """Ranks the candidates of a prefill.

    A scorer is a frozen dataclass whose fields are its options, registered under a name by `register_scorer`.

    Class attributes:
        paper: where the method comes from.
        looks_at_question: whether the end of the prompt, where a question stands, decides what is kept.
        reads_values: whether it needs the values too, besides queries and keys.
    """

    paper: ClassVar[str]
    looks_at_question: ClassVar[bool]
    reads_values: ClassVar[bool]

    def __call__(self, prompt: PromptView) -> Tensor:
        """Scores, float32 `[rows, kv_heads, N]`, higher for what should stay; finite."""
        ...


_scorers: dict[str, Callable[..., Scorer]] = {}
S = TypeVar("S", bound=Callable[..., Scorer])


def register_scorer(name: str) -> Callable[[S], S]:
    """Class decorator: make a scorer known to `Policy(scorer=name)`.

    Raises:
        BudgetError: the name is taken.
    """

    def register(factory: S) -> S:
        if name in _scorers:
            raise BudgetError(f"a scorer named {name!r} is registered already; choose another name")
        _scorers[name] = factory
        return factory

    return register


def scorer_names() -> tuple[str, ...]:
    """The names of the registered scorers."""
    return tuple(sorted(_scorers))


def make_scorer(name: str, options: Mapping[str, int | float | str]) -> Scorer:
    """The scorer registered as `name`, with its options.

    Raises:
        BudgetError: no such scorer, or options that it does not take.
    """
    factory = _scorers.get(name)
    if factory is None:
        raise BudgetError(f"unknown scorer {name!r}; registered are {', '.join(scorer_names())}")
    known: set[str] = (
        {field.name for field in dataclasses.fields(factory)} if dataclasses.is_dataclass(factory) else set()
    )
    unknown = sorted(set(options) - known)
    if unknown:
        raise BudgetError(
            f"the scorer {name!r} has no option {', '.join(map(repr, unknown))}; it takes {', '.join(sorted(known))}"
        )
    return factory(**options)


def scorer_of(policy: Policy) -> Scorer:
    """The scorer that a policy names."""
    return make_scorer(policy.scorer, policy.scorer_options)


def score_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    length: Tensor,
    seen: Tensor | None,
    scale: float,
    scorer: Scorer,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Scores of the new tokens in a fresh prefill, float32 `[rows, kv_heads, S]`; see `PromptView` for the shapes."""
    seen = torch.zeros_like(length) if seen is None else seen
    return scorer(PromptView(q, k, v, length, scale, seen, sliding_window=sliding_window, softcap=softcap, sinks=sinks))


def rescore_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    seen: Tensor,
    base: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    scorer: Scorer,
    plan: SlotPlan,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Scores of a layer's slots and of the new tokens together, float32 `[rows, kv_heads, slots + S]`."""
    ordinals = plan.ordinals(positions, seen, base)
    return scorer(PromptView(q, k, v, length, scale, seen, k_cache, v_cache, ordinals, sliding_window, softcap, sinks))
