"""How a plan was made: which model, what was asked for, and what is expected of it.

Like the plan, this needs neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from xkv_fx.errors import BudgetError
from xkv_fx.fields import ANYTHING, check_fields
from xkv_fx.files import is_finite, is_int

_BYTES = ("kv_bytes", "full_kv_bytes")
SINCE_VERSION_3 = (*_BYTES, "sliding_windows")
"""Fields that plans before version 3 of their file know nothing of."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """How a plan was made; None where it was written by hand.

    Attributes:
        model: fingerprint of the model that was measured. A plan with one is refused by every other model.
        allocator: the allocator's name.
        constraint: what was asked for, such as `{"fraction": 0.384}`. With `kv_bytes`, a limit that holds for what is
            allocated, also `batch_size`, `itemsize` (of the dtype) and `max_new_tokens` where the limit counts them.
        context: tokens of prompt that the capacities were solved for.
        source: SHA-256 of the profile or calibration that the plan was solved from.
        expected_retention: mean over layers of the share of attention mass that is kept.
        expected_kl: sum over layers of the divergence that a calibration measured at their capacities, nats.
        held_out: what `verify` measured on held-out prompts.
        kv_bytes: bytes that a row of this plan takes in the dtype that was measured, without room for appended tokens.
        full_kv_bytes: bytes that a full cache of `context` tokens takes there, sliding windows clamped.
        sliding_windows: of each layer, None for a layer without; None as a whole where that is unknown or all are so.

    Raises:
        BudgetError: a field of the wrong type, or a number that is not finite.
    """

    model: str | None = None
    allocator: str | None = None
    constraint: Mapping[str, float] | None = dataclasses.field(default=None, hash=False)
    context: int | None = None
    source: str | None = None
    expected_retention: float | None = None
    expected_kl: float | None = None
    held_out: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    kv_bytes: int | None = None
    full_kv_bytes: int | None = None
    sliding_windows: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("model", "allocator", "source"):
            self._check(name, isinstance(getattr(self, name), str))
        for name in ("constraint", "held_out"):
            self._check(name, isinstance(getattr(self, name), Mapping))
        for name in ("expected_retention", "expected_kl"):
            self._check(name, is_int(getattr(self, name)) or is_finite(getattr(self, name)))
        for name in ("context", *_BYTES):
            value = getattr(self, name)
            self._check(name, is_int(value))
            if value is not None:
                if value < 1:
                    raise BudgetError(f"provenance field {name!r} must be at least 1; got {value}")
                object.__setattr__(self, name, int(value))
        self._check_constraint(self.constraint or {})
        if self.sliding_windows is not None:
            windows = self.sliding_windows
            is_list = isinstance(windows, Sequence) and not isinstance(windows, str | bytes)
            self._check("sliding_windows", is_list and all(w is None or (is_int(w) and w > 0) for w in windows))
            kept = tuple(None if window is None else int(window) for window in windows)
            object.__setattr__(self, "sliding_windows", kept if any(kept) else None)

    @property
    def share(self) -> float | None:
        """`kv_bytes` as a share of `full_kv_bytes`; None where they are unknown."""
        return None if self.kv_bytes is None or self.full_kv_bytes is None else self.kv_bytes / self.full_kv_bytes

    def _check(self, name: str, good: bool) -> None:
        value = getattr(self, name)
        if value is not None and not good:
            raise BudgetError(f"provenance field {name!r} has the wrong type: {value!r}")

    @staticmethod
    def _check_constraint(constraint: Mapping[str, Any]) -> None:
        for name in ("kv_bytes", "batch_size", "itemsize", "max_new_tokens"):
            if name in constraint and (not is_int(constraint[name]) or constraint[name] < 1):
                raise BudgetError(
                    f"the constraint's {name} must be a whole number of at least 1; got {constraint[name]!r:.100}"
                )

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types; what older versions know nothing of only where it is known."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.sliding_windows is not None:
            fields["sliding_windows"] = list(self.sliding_windows)
        return {name: value for name, value in fields.items() if value is not None or name not in SINCE_VERSION_3}

    @classmethod
    def from_dict(cls, data: Any) -> Provenance:
        """The provenance that a file holds; fields that are left out are None.

        Raises:
            FileFormatError, BudgetError: it holds none; the message does not name the file.
        """
        expected = {field.name: ANYTHING for field in dataclasses.fields(cls)}  # the class checks their values
        return cls(**check_fields(data, expected, "provenance", optional=expected, unknown="provenance field"))
