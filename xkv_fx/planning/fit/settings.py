"""What a fit is asked for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from xkv_fx.errors import BudgetError
from xkv_fx.files import is_int
from xkv_fx.formats import LayerFormats
from xkv_fx.layers import LayerSpec
from xkv_fx.planning.data.grid import can_store
from xkv_fx.planning.measure.calibrate import check_measurable
from xkv_fx.planning.measure.points import pairs_to_measure
from xkv_fx.policy import Policy

SCORERS = ("snapkv", "expected_attention", "key_diff")
FORMATS = ("model", "int8", "int4")


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """Everything but the model and its prompts.

    Attributes:
        kv_bytes: the most bytes that K/V buffers may take; None where `kl` bounds the divergence.
        kl: the largest mean KL on held-out prompts, nats; None where `kv_bytes` is given.
        context: tokens of prompt to plan for; the longest given prompt when None.
        batch_size: rows.
        max_new_tokens: generated tokens that a plan with `eviction="append"` has room for; with 0, plans evict by
            `"ring"` alone, which has room for any number.
        formats: what slots may store; see `xkv_fx.calibrate`.
        scorers: that may rank tokens.
        by: what gets a capacity of its own: `"layer"`, `"head"`.
        multiple: capacities are rounded to multiples of this.
        continuation: last tokens of each held-out prompt, fed as decode would and measured.
        seconds: that it may take, about; None for as many as it needs.

    Raises:
        BudgetError: a value out of its range.
    """

    kv_bytes: int | None
    kl: float | None = None
    context: int | None = None
    batch_size: int = 1
    max_new_tokens: int = 0
    formats: Sequence[str | LayerFormats] = FORMATS
    scorers: Sequence[str] = SCORERS
    by: Sequence[str] = ("layer", "head")
    multiple: int = 16
    continuation: int = 48
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.kv_bytes is None) == (self.kl is None):
            raise BudgetError("a fit has one limit: give kv_bytes or kl")
        if self.kv_bytes is not None and (not is_int(self.kv_bytes) or self.kv_bytes < 1):
            raise BudgetError(f"kv_bytes must be a whole number of at least 1; got {self.kv_bytes!r}")
        for name, least in (("batch_size", 1), ("max_new_tokens", 0), ("multiple", 1), ("continuation", 1)):
            if not is_int(getattr(self, name)) or getattr(self, name) < least:
                raise BudgetError(f"{name} must be a whole number of at least {least}; got {getattr(self, name)!r}")
        for name in ("kl", "seconds"):
            value = getattr(self, name)
            if value is not None and not _positive(value):
                raise BudgetError(f"{name} must be a number above 0; got {value!r}")
        if not self.scorers or isinstance(self.scorers, str):
            raise BudgetError(f"scorers must be a sequence of names, at least one; got {self.scorers!r}")
        if isinstance(self.by, str) or not self.by or not set(self.by) <= {"layer", "head"}:
            raise BudgetError(f"by must be a sequence of 'layer' and 'head', at least one of them; got {self.by!r}")
        pairs_to_measure(self.formats)
        for policy in self.policies:
            check_measurable(policy, self.continuation)

    @property
    def evictions(self) -> tuple[str, ...]:
        return ("append", "ring") if self.max_new_tokens else ("ring",)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """All that are tried; those of one scorer beside one another."""
        return tuple(
            Policy(scorer=scorer, eviction=eviction)  # type: ignore[arg-type]  # one of its names
            for scorer in self.scorers
            for eviction in self.evictions
        )

    @property
    def constraint(self) -> dict[str, float]:
        """As `solve` writes it into a plan, which `transform` then holds to."""
        if self.kv_bytes is None:
            return {"kl": self.kl or 0.0}
        room = {"max_new_tokens": self.max_new_tokens} if self.max_new_tokens else {}
        return {"kv_bytes": self.kv_bytes, "batch_size": self.batch_size, **room}

    def pairs(self, layers: Sequence[LayerSpec]) -> tuple[LayerFormats | None, ...]:
        """The formats of keys and values that all layers can be stored in."""
        return tuple(pair for pair in pairs_to_measure(self.formats) if can_store(layers, pair))

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types, so that what a file holds of it is equal to it."""
        settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return settings


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)
