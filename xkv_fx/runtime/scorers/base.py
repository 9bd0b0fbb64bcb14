"""The interface of a scorer, and the names under which policies refer to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from xkv_fx.errors import BudgetError, did_you_mean
from xkv_fx.files import is_int
from xkv_fx.policy import Policy
from xkv_fx.runtime.attention import values_of
from xkv_fx.runtime.coded import Stored
from xkv_fx.runtime.form import AttentionForm
from xkv_fx.runtime.graph_calls import named_call
from xkv_fx.runtime.reading import Reading
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
        measures_attention: whether its scores are attention probabilities that were summed or averaged. Only such
            scores make a retention curve, and only they can be added to the attention that decode accumulates under
            `eviction="scored"`. False for a class that does not say.

    A class may have `independent_heads = True`: the scores of a KV head follow from its own queries, keys and values,
    whichever of the model's heads it is. Only such a scorer chooses the same tokens where processes share the heads
    (tensor parallelism).

    A class may have `knows_heads = True`: the scores of a KV head follow from its own queries, keys and values, and
    from its place among its layer's heads, which is in `PromptView.heads`. A plan by KV head needs one of these two,
    since heads with different capacities are scored apart.

    A class may have `needs_unrotated_queries = True`. Such a scorer is given the queries as they were before
    their positions rotated them, and how positions to come will rotate them: `PromptView.unrotated_queries` and
    `PromptView.rotation`. It has a field `future_positions`, the number of positions that `rotation` is the mean over.
    Models whose rotation cannot be told from the rest of their graph are refused.

    A class may have a property `reading`, a `Reading`. Such a scorer is given the new tokens twice, in the columns of
    `q` and `k`: `length` counts those of the first reading. What its slots were scored stays with them and comes back
    as `PromptView.old_scores`.
    """

    paper: ClassVar[str]
    looks_at_question: ClassVar[bool]
    reads_values: ClassVar[bool]
    measures_attention: ClassVar[bool] = False

    def __call__(self, prompt: PromptView) -> Tensor:
        """Scores, float32 `[rows, kv_heads, N]`, higher for what should stay; finite.

        It may branch and loop over lengths as it likes: prompt graphs run as they are, on tensors with numbers in them.
        """
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
        BudgetError: no such scorer, options that it does not take, or a required option left out.
    """
    factory = _scorers.get(name)
    if factory is None:
        names = scorer_names()
        raise BudgetError(f"unknown scorer {name!r}; registered are {', '.join(names)}{did_you_mean(name, names)}")
    known = {option: parameter.default for option, parameter in inspect.signature(factory).parameters.items()}
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = ", ".join(sorted(known)) or "none"
        raise BudgetError(f"the scorer {name!r} has no option {', '.join(map(repr, unknown))}; it takes {takes}")
    missing = [
        option for option, default in known.items() if default is inspect.Parameter.empty and option not in options
    ]
    if missing:
        raise BudgetError(
            f"the scorer {name!r} has no default for {', '.join(map(repr, missing))}; say so in the policy's "
            "scorer_options"
        )
    return factory(**options)


def scorer_of(policy: Policy) -> Scorer:
    """The scorer that a policy names.

    Raises:
        BudgetError: as `make_scorer`; or the policy evicts by accumulated attention, and the scorer measures another
            quantity, which would be added to it.
    """
    scorer = make_scorer(policy.scorer, policy.scorer_options)
    if policy.eviction == "scored":
        check_measures_attention(
            policy.scorer, scorer, "eviction='scored' would add the attention of decoded tokens to them"
        )
        if reading_of(scorer) is not None:
            raise BudgetError(
                f"the scorer {policy.scorer!r} reads prompts again, and its scores are not those that "
                "eviction='scored' adds attention to; choose eviction='ring' or 'append'"
            )
    return scorer


def check_measures_attention(name: str, scorer: Scorer, otherwise: str) -> None:
    """Refuse a scorer whose scores are not attention mass.

    Args:
        otherwise: what would go wrong with such a scorer, for the message.

    Raises:
        BudgetError: the scorer is of that kind; its name is in the message.
    """
    if getattr(scorer, "measures_attention", False):
        return
    able = [other for other, factory in sorted(_scorers.items()) if getattr(factory, "measures_attention", False)]
    raise BudgetError(
        f"the scores of {name!r} are not attention mass, and {otherwise}; choose one of {', '.join(able)}, or set "
        "measures_attention = True on a scorer's class where it is true"
    )


def check_independent_heads(name: str, scorer: Scorer) -> None:
    """Refuse a scorer that would choose different tokens if it saw only some of the heads.

    Args:
        name: the policy's name for it, for the message.

    Raises:
        BudgetError: it would, or its class does not say that it would not.
    """
    if getattr(scorer, "independent_heads", False):
        return
    able = [other for other, factory in sorted(_scorers.items()) if getattr(factory, "independent_heads", False)]
    raise BudgetError(
        f"the scorer {name!r} does not score each KV head by itself, and each of the processes that share this model "
        f"has some of the heads; choose one of {', '.join(able)}, or set independent_heads = True on a scorer's class "
        "where it is true"
    )


def reading_of(scorer: Scorer) -> Reading | None:
    """How prompts are fed to a scorer that reads them again; None for one that does not."""
    reading: Reading | None = getattr(scorer, "reading", None)
    return reading


def check_scores_parts(scorer: Scorer) -> None:
    """Refuse a scorer that must see all heads of a layer, for a plan that gives them different capacities.

    Raises:
        BudgetError: it must, or its class does not say that it need not.
    """
    if any(getattr(scorer, able, False) for able in ("independent_heads", "knows_heads")):
        return
    raise BudgetError(
        f"the scorer {type(scorer).__name__} does not say that it scores each KV head by itself, and this plan gives "
        "the KV heads of a layer different capacities or formats, so that they are scored apart; set independent_heads "
        "= True on the scorer's class where that is true, or plan by layer"
    )


def future_positions(scorer: Scorer) -> int | None:
    """Over how many positions a scorer wants the mean rotation of its queries; None if it needs no unrotated ones.

    Raises:
        BudgetError: it needs unrotated queries, and does not say over how many positions.
    """
    if not getattr(scorer, "needs_unrotated_queries", False):
        return None
    count = getattr(scorer, "future_positions", None)
    if not is_int(count) or count < 1:
        raise BudgetError(
            f"the scorer {type(scorer).__name__} needs unrotated queries; it must have a field future_positions, a "
            f"whole number of at least 1; got {count!r}"
        )
    return count


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
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
    unrotated: Tensor | None = None,
    rotation: Tensor | None = None,
    heads: tuple[int, ...] | None = None,
) -> Tensor:
    """Scores of the new tokens in a fresh prefill, float32 `[rows, kv_heads, S]`; see `PromptView` for the shapes."""
    seen = torch.zeros_like(length) if seen is None else seen
    form = AttentionForm(scale, sliding_window, softcap, sink_logits, slopes)
    return _run(scorer, PromptView(q, k, v, length, form, seen, unrotated=unrotated, rotation=rotation, heads=heads))


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
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
    unrotated: Tensor | None = None,
    rotation: Tensor | None = None,
    held_scores: Tensor | None = None,
    heads: tuple[int, ...] | None = None,
) -> Tensor:
    """Scores of a layer's slots and of the new tokens together, float32 `[rows, kv_heads, slots + S]`."""
    form = AttentionForm(scale, sliding_window, softcap, sink_logits, slopes)
    ordinals = plan.ordinals(positions, seen, base)
    held = k_cache, values_of(k_cache, v_cache), ordinals
    kept = _scores_kept(held_scores, positions, ordinals)
    return _run(scorer, PromptView(q, k, v, length, form, seen, *held, unrotated, rotation, kept, heads))


def rescore_coded_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    seen: Tensor,
    base: Tensor,
    k_cache: Tensor,
    k_scales: Tensor,
    v_cache: Tensor,
    v_scales: Tensor,
    positions: Tensor,
    scale: float,
    scorer: Scorer,
    plan: SlotPlan,
    key_bits: int,
    value_bits: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slopes: Tensor | None = None,
    unrotated: Tensor | None = None,
    rotation: Tensor | None = None,
    held_scores: Tensor | None = None,
    key_mean: Tensor | None = None,
    heads: tuple[int, ...] | None = None,
) -> Tensor:
    """As `rescore_tokens` over slots of fewer bits: what was stored is what is scored; see `coded_ops`."""
    form = AttentionForm(scale, sliding_window, softcap, sink_logits, slopes)
    buffers, bits = (k_cache, k_scales, v_cache, v_scales), (key_bits, value_bits)
    keys, values = Stored.pair(buffers, bits, (k.shape[-1], v.shape[-1]), key_mean)
    ordinals = plan.ordinals(positions, seen, base)
    kept = _scores_kept(held_scores, positions, ordinals)
    held = keys, values, ordinals, unrotated, rotation, kept, heads
    return _run(scorer, PromptView(q, k, v, length, form, seen, *held))


def _scores_kept(scores: Tensor | None, positions: Tensor, ordinals: Tensor) -> Tensor | None:
    """Scores of the tokens that a prompt or turn left in the slots; 0 for those that decode wrote since."""
    return None if scores is None else scores.masked_fill(ordinals != positions, 0.0)


def scoring_call(
    function: Callable[..., Tensor], scorer: Scorer, slots: int = 0, **fixed: object
) -> Callable[..., Tensor]:
    """`score_tokens` or `rescore_tokens` as a function that a graph can call and print: the scorer, and what else a
    graph cannot hold, are fixed in it. The shape of the scores is what every scorer promises.

    Args:
        slots: candidates besides the new tokens.
    """

    def score(*args: object, **kwargs: object) -> Tensor:
        return function(*args, scorer=scorer, **kwargs, **fixed)

    def fake(q: Tensor, k: Tensor, *args: object, **kwargs: object) -> Tensor:
        return k.new_empty((*k.shape[:2], slots + k.shape[2]), dtype=torch.float32)

    return named_call(score, fake, f"{function.__name__}_by_{type(scorer).__name__}", function.__module__)


def _run(scorer: Scorer, prompt: PromptView) -> Tensor:
    """The scores of all candidates.

    Raises:
        BudgetError: they are not what a scorer promises; the message names the scorer's class.
    """
    scores: object = scorer(prompt)
    slots = 0 if prompt.old_k is None else prompt.old_k.shape[2]
    shape = (*prompt.k.shape[:2], slots + prompt.k.shape[2])
    if not isinstance(scores, Tensor):
        got = type(scores).__name__
    elif scores.shape != shape or scores.dtype != torch.float32 or scores.device != prompt.k.device:
        got = f"{scores.dtype} of shape {list(scores.shape)} on {scores.device}"
    else:
        return scores
    raise BudgetError(
        f"the scorer {type(scorer).__name__} must return torch.float32 of shape {list(shape)} on {prompt.k.device} for "
        f"these tokens; it returned {got}"
    )
