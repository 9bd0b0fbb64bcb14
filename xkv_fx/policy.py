"""Which tokens a layer keeps: the policy that a plan is valid for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from xkv_fx.errors import BudgetError, did_you_mean
from xkv_fx.fields import ANYTHING, check_fields, refuse_missing
from xkv_fx.files import is_finite, is_int

Eviction = Literal["ring", "scored", "append", "none"]
EVICTIONS: tuple[str, ...] = get_args(Eviction)
SCORERS = (
    "expected_attention", "h2o", "key_diff", "key_norm", "random", "reconstruction", "snapkv", "streaming", "tova",
    "value_norm",
)  # fmt: skip
"""The scorers that come with this package; a policy may name others, which must be registered where it is used."""


def _letters(name: str) -> str:
    """A name without capitals and separators: where only these differ, no other name was meant."""
    return "".join(filter(str.isalnum, name.lower()))


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which tokens a layer keeps. A plan is valid only for the policy that it was made with.

    Attributes:
        scorer: name of the registered scorer that ranks prompt tokens. `"snapkv"` is the paper's (XKV section 4,
            after SnapKV, arXiv 2404.14469).
        scorer_options: that scorer's own parameters, for `"snapkv"` `observation_window` (8) and `kernel` (7).
        eviction: what decode does once every slot is taken: `"ring"` overwrites the oldest of the newest `recent`
            tokens, `"scored"` the lowest accumulated score outside `recent`, `"append"` takes a further slot that was
            set aside at transform time (in a layer whose slots fill its sliding window, one that has left the window),
            `"none"` refuses (full caches).
        recent: how many of the newest tokens are always kept; None means `min(64, max(1, capacity // 4))`.
        sinks: how many of the first tokens are always kept, as long as a layer's sliding window reaches them.

    Raises:
        BudgetError: an unknown eviction, a scorer misspelt like "snapKV", a negative count, or an option that is not a
            finite number or a string.
    """

    scorer: str = "snapkv"
    scorer_options: Mapping[str, int | float | str] = dataclasses.field(default_factory=dict)
    eviction: Eviction = "ring"
    recent: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.eviction not in EVICTIONS:
            meant = did_you_mean(self.eviction, EVICTIONS)
            raise BudgetError(f"unknown eviction {self.eviction!r}; choose one of {', '.join(EVICTIONS)}{meant}")
        if not isinstance(self.scorer, str) or not self.scorer:
            raise BudgetError(f"the scorer must be the name of a registered scorer, not {self.scorer!r}")
        if self.scorer not in SCORERS and _letters(self.scorer) in map(_letters, SCORERS):
            raise BudgetError(f"unknown scorer {self.scorer!r}{did_you_mean(self.scorer, SCORERS)}")
        if self.recent is not None and (not is_int(self.recent) or self.recent < 1):
            raise BudgetError(f"recent must be a whole number of at least 1, or None; got {self.recent!r}")
        if not is_int(self.sinks) or self.sinks < 0:
            raise BudgetError(f"sinks must be a whole number of at least 0; got {self.sinks!r}")
        if not isinstance(self.scorer_options, Mapping):
            raise BudgetError(f"scorer_options must be a mapping of names to numbers; got {self.scorer_options!r}")
        options: dict[str, int | float | str] = {}
        for name, value in self.scorer_options.items():
            if not isinstance(name, str) or not (is_int(value) or is_finite(value) or isinstance(value, str)):
                raise BudgetError(f"scorer option {name!r} must be a finite number or a string; got {value!r}")
            options[name] = int(value) if is_int(value) else value
        object.__setattr__(self, "scorer_options", dict(sorted(options.items())))
        object.__setattr__(self, "recent", None if self.recent is None else int(self.recent))
        object.__setattr__(self, "sinks", int(self.sinks))

    def __hash__(self) -> int:
        return hash((self.scorer, tuple(self.scorer_options.items()), self.eviction, self.recent, self.sinks))

    def recent_for(self, capacity: int) -> int:
        """How many of the newest tokens a layer of `capacity` slots always keeps."""
        if self.recent is None:
            return min(64, max(1, capacity // 4))
        return min(self.recent, capacity)

    def sinks_for(self, capacity: int) -> int:
        """How many of the first tokens a layer of `capacity` slots always keeps, after its recent ones."""
        return min(self.sinks, capacity - self.recent_for(capacity))

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Any) -> Policy:
        """The policy in a file, which must give every field: a missing one would silently become today's default.

        Raises:
            FileFormatError, BudgetError: it holds none; the message does not name the file.
        """
        expected = {field.name: ANYTHING for field in dataclasses.fields(cls)}  # the class checks their values
        fields = check_fields(data, expected, "the policy", optional=expected, unknown="policy fields")
        policy = cls(**fields)  # reports a bad value before a missing field
        refuse_missing(fields, expected, "the policy")
        return policy
