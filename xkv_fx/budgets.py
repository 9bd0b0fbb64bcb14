"""The plan that every part shares: how many K/V slots each layer owns, and the policy that fills them.

This module sits below every subpackage. A plan needs neither torch nor transformers to be read, written or
checked. Users hold an `xkv_fx.Budgets`, which is a `Plan` that can also read a transformers model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from xkv_fx.engine_settings import engine_settings
from xkv_fx.errors import BudgetError, FileFormatError, ModelMismatchError
from xkv_fx.fields import ANYTHING, DOCUMENT, LIST, OBJECT, Fields, check_fields
from xkv_fx.file_kinds import read_as
from xkv_fx.files import check_format, is_finite, is_int, read_json, write_json
from xkv_fx.formats import LayerFormats, checked_formats, codes_keys
from xkv_fx.layers import HasItemSize, Layers, layers_of
from xkv_fx.mean_keys import (
    MeanKeys,
    check_fits,
    checked_mean_keys,
    of_part,
    read_constants,
    reference_to,
    write_constants,
)
from xkv_fx.policy import Policy

FORMAT = "xkv_fx.budgets"
FORMAT_VERSION = 3  # version 1 has no formats, 2 no constants, and no bytes and sliding windows in its provenance
CONSTANTS = "constants.safetensors"
"""The file of a plan's constants, where nothing else names it."""
# Each part checks its own fields.
_FIELDS: Fields = {**DOCUMENT, **dict.fromkeys(("capacities", "policy", "provenance"), ANYTHING)}
_WITH_FORMATS: Fields = {**_FIELDS, "formats": LIST}
_WITH_CONSTANTS: Fields = {**_WITH_FORMATS, "constants": OBJECT}
_FIELDS_OF: Mapping[int, Fields] = {1: _FIELDS, 2: _WITH_FORMATS, 3: _WITH_CONSTANTS}


_BYTES = ("kv_bytes", "full_kv_bytes")
_SINCE_VERSION_3 = (*_BYTES, "sliding_windows")


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
        return {name: value for name, value in fields.items() if value is not None or name not in _SINCE_VERSION_3}

    @classmethod
    def from_dict(cls, data: Any) -> Provenance:
        """The provenance that a file holds; fields that are left out are None.

        Raises:
            FileFormatError, BudgetError: it holds none; the message does not name the file.
        """
        expected = {field.name: ANYTHING for field in dataclasses.fields(cls)}  # the class checks their values
        return cls(**check_fields(data, expected, "provenance", optional=expected, unknown="provenance field"))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Per-layer KV cache capacities and the policy that they are valid for.

    Plans with equal content are equal, whatever their subclass.

    Attributes:
        capacities: K/V slots of each layer that owns a cache, in execution order, *per KV head and row*; recent
            tokens are part of it.
        policy: how those slots are filled.
        provenance: how the plan was made.
        formats: how each layer stores its slots: a pair of names of `xkv_fx.formats`, of its keys and of its values,
            or None for the model's dtype; None as a whole if all layers do.
        mean_keys: what is subtracted from each layer's keys before they are stored in fewer bits: a `MeanKey` or its
            numbers, float32 `[kv_heads, key_dim]`, or None for nothing. None as a whole if nothing is subtracted
            anywhere, or no layer stores its keys in fewer bits.

    Raises:
        BudgetError: no layers, a capacity that is not a whole number of at least 1, or formats or mean keys that are
            unknown or not one for each capacity.
    """

    capacities: tuple[int, ...]
    policy: Policy = dataclasses.field(default_factory=Policy)
    provenance: Provenance = Provenance()
    formats: tuple[LayerFormats | None, ...] | None = None
    mean_keys: MeanKeys | None = None

    def __post_init__(self) -> None:
        if isinstance(self.capacities, str | bytes | bytearray) or not isinstance(self.capacities, Sequence):
            raise BudgetError(f"capacities must be a sequence of whole numbers; got {type(self.capacities).__name__}")
        if not self.capacities:
            raise BudgetError("capacities is empty; give one whole number for each layer that owns a cache")
        for layer, capacity in enumerate(self.capacities):
            if not is_int(capacity):
                raise BudgetError(f"the capacity of layer {layer} must be a whole number; got {capacity!r}")
            if capacity < 1:
                raise BudgetError(f"the capacity of layer {layer} must be at least 1; got {capacity}")
        object.__setattr__(self, "capacities", tuple(int(c) for c in self.capacities))
        if not isinstance(self.policy, Policy):
            raise BudgetError(f"policy must be an xkv_fx.Policy; got {type(self.policy).__name__}")
        if not isinstance(self.provenance, Provenance):
            raise BudgetError(f"provenance must be a Provenance; got {type(self.provenance).__name__}")
        windows = self.provenance.sliding_windows
        if windows is not None and len(windows) != len(self.capacities):
            raise BudgetError(
                f"the provenance has {len(windows)} sliding windows for {len(self.capacities)} capacities"
            )
        object.__setattr__(self, "formats", checked_formats(self.formats, len(self.capacities)))
        means = checked_mean_keys(self.mean_keys, len(self.capacities))
        coded = any(codes_keys(pair) for pair in self.layer_formats)
        object.__setattr__(self, "mean_keys", means if coded else None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return all(getattr(self, field.name) == getattr(other, field.name) for field in dataclasses.fields(Plan))

    @classmethod
    def uniform(cls, layers: int, tokens: int, policy: Policy | None = None) -> Self:
        """The same capacity of `tokens` slots for each of `layers` layers."""
        if not is_int(layers) or layers < 1:
            raise BudgetError(f"layers must be a whole number of at least 1; got {layers!r}")
        return cls((tokens,) * layers, policy or Policy(), Provenance(allocator="uniform"))

    @classmethod
    def full(cls, layers: int, tokens: int) -> Self:
        """Room for every one of `tokens` tokens in each layer: nothing is ever evicted, and more is an error."""
        return dataclasses.replace(
            cls.uniform(layers, tokens, Policy(eviction="none")), provenance=Provenance(allocator="full")
        )

    @property
    def total_tokens(self) -> int:
        """The sum of the capacities."""
        return sum(self.capacities)

    @property
    def layer_formats(self) -> tuple[LayerFormats | None, ...]:
        """The formats of each layer, None for the model's dtype."""
        return (None,) * len(self.capacities) if self.formats is None else self.formats

    @property
    def recent(self) -> tuple[int, ...]:
        """The newest tokens that each layer always keeps. A layer that holds its whole sliding window keeps just that;
        of a plan by hand, which knows nothing of windows, it is what the policy says."""
        windows = self.provenance.sliding_windows or (None,) * len(self.capacities)
        return tuple(
            window if window is not None and capacity >= window else self.policy.recent_for(capacity)
            for capacity, window in zip(self.capacities, windows, strict=True)
        )

    def subtracted(self, layers: Layers, part: int = 0, parts: int = 1) -> MeanKeys | None:
        """The mean key of each layer that stores its keys in fewer bits, None for the others; None where there is none.

        Args:
            part, parts: which of several processes that share out a model's KV heads asks, and how many they are;
                `layers` are what its own part of the model caches.

        Raises:
            BudgetError: as `check_layers`, or mean keys of another number of heads.
        """
        self.check_layers(layers)
        if self.mean_keys is None:
            return None
        planned = zip(self.mean_keys, layers_of(layers), self.layer_formats, strict=True)
        means = [
            None if mean is None or not codes_keys(pair) else of_part(mean, layer, spec.kv_heads, part, parts)
            for layer, (mean, spec, pair) in enumerate(planned)
        ]
        return checked_mean_keys(means, len(means))

    def check_layers(self, layers: Layers, model: str | None = None) -> None:
        """Check that this plan fits a model with these layers and, where both are known, this fingerprint.

        Raises:
            BudgetError: the number of capacities differs from the number of layers, a layer cannot be stored in its
                formats, or has other keys than its mean key.
            ModelMismatchError: the plan was made for another model.
        """
        specs = layers_of(layers)
        count = len(specs)
        if len(self.capacities) != count:
            raise BudgetError(
                f"the plan has {len(self.capacities)} capacities but the model has {count} layers that own a KV "
                "cache; give one capacity for each of them"
            )
        for layer, (spec, pair) in enumerate(zip(specs, self.layer_formats, strict=True)):
            if pair is None:
                continue
            try:
                spec.slot_bytes(formats=pair)
            except BudgetError as error:
                stored = f"the plan stores keys of layer {layer} as {pair[0]} and its values as {pair[1]}"
                raise BudgetError(f"{stored}, but {error}") from error
        for layer, (spec, mean) in enumerate(zip(specs, self.mean_keys or (), strict=False)):
            if mean is not None:
                check_fits(mean, layer, spec.kv_heads, spec.key_dim)
        planned_for = self.provenance.model
        if planned_for is not None and model is not None and planned_for != model:
            raise ModelMismatchError(
                f"the plan was made for the model {planned_for!r}, not for {model!r}; profile and solve for this model"
            )

    def slots(self, layers: Layers, max_new_tokens: int = 0) -> tuple[int, ...]:
        """Slots that are actually allocated for each layer.

        Under `eviction="append"` each layer gets room for `max_new_tokens` besides its capacity. Capacity and room
        together are clamped to the layer's sliding window: with that many slots, no token in the window is lost.

        Raises:
            BudgetError: as `check_layers`, or `max_new_tokens` is not a whole number of at least 0.
        """
        self.check_layers(layers)
        if not is_int(max_new_tokens) or max_new_tokens < 0:
            raise BudgetError(f"max_new_tokens must be a whole number of at least 0; got {max_new_tokens!r}")
        room = max_new_tokens if self.policy.eviction == "append" else 0
        return tuple(
            spec.effective_capacity(capacity + room)
            for spec, capacity in zip(layers_of(layers), self.capacities, strict=True)
        )

    def kv_bytes(
        self, model: Layers, batch_size: int = 1, dtype: HasItemSize | None = None, max_new_tokens: int = 0
    ) -> int:
        """Bytes that the K/V buffers of `batch_size` rows take.

        Args:
            model: the model's `LayerSpec`s, or an object that has them as `layers`, such as a transformed model.
            batch_size: rows after expansion: batch x beams or return sequences.
            dtype: the dtype of whatever has no format of its own; the model's by default.
            max_new_tokens: room set aside for generated tokens; counts under `eviction="append"` only.

        Raises:
            BudgetError: as `check_layers`, or a count that is not a whole number in its range.
        """
        if not is_int(batch_size) or batch_size < 1:
            raise BudgetError(f"batch_size must be a whole number of at least 1; got {batch_size!r}")
        layers = layers_of(model)
        planned = zip(self.slots(layers, max_new_tokens), layers, self.layer_formats, strict=True)
        return sum(slots * spec.slot_bytes(dtype, formats) for slots, spec, formats in planned) * batch_size

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all.

        The constants of a plan that has any are written before it, beside it: those of `budgets.json` as
        `budgets.json.safetensors`. The JSON names that file and its SHA-256.
        """
        constants = f"{Path(path).name}.safetensors"
        if self.mean_keys is not None:
            write_constants(Path(path).parent / constants, self.mean_keys)
        write_json(path, self.to_dict(constants))

    def to_dict(self, constants: str = CONSTANTS) -> dict[str, Any]:
        """The plan as JSON's types.

        It is written as the oldest version that can say all of it, so that older readers can read what they understand,
        and refuse a plan with formats or constants instead of storing its slots in the wrong way.

        Args:
            constants: the name of the file that holds the constants, if there are any.
        """
        provenance = self.provenance.to_dict()
        data = {
            "format": FORMAT,
            "version": 1,
            "capacities": list(self.capacities),
            "policy": self.policy.to_dict(),
            "provenance": provenance,
        }
        if self.formats is not None:
            formats = [None if pair is None else list(pair) for pair in self.formats]
            data = {**data, "version": 2, "formats": formats}
        if self.mean_keys is not None:
            return {**data, "version": 3, "constants": reference_to(constants, self.mean_keys)}
        return {**data, "version": 3} if any(name in provenance for name in _SINCE_VERSION_3) else data

    def to(self, engine: str, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """This plan in another engine's own settings. These engines keep the newest tokens only (and sinks): what the
        policy's scorer would keep of the middle of a prompt is lost there, so measured quality does not carry over.

        - `"tensorrt-llm"`: arguments of its `KvCacheConfig`, one size a layer.
        - `"executorch"`: the argument of its `replace_kv_cache_with_ring_kv_cache`, one ring a layer; no sinks.
        - `"openvino"`: arguments of OpenVINO GenAI's `CacheEvictionConfig`. It has one size for all layers, so only the
          plan's total carries over: the mean capacity, rounded down to whole blocks of 32 tokens.

        Args:
            engine: one of these names.
            path: where to write the same as JSON, if anywhere.

        Returns:
            `engine`, `settings`, and a `note` that says what is lost.

        Raises:
            BudgetError: an unknown engine, or a plan too small for its blocks.
        """
        settings, note = engine_settings(engine, self.capacities, self.policy.sinks)
        if self.formats is not None:
            note += "; the plan's formats are not carried over, so slots are stored as that engine is told to"
        result = {"engine": engine, "settings": settings, "note": note}
        if path is not None:
            write_json(path, result)
        return result

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a plan that `save` wrote.

        Raises:
            FileFormatError: not a plan, damaged, of a newer format, or without its constants; the message names the
                file.
            MissingFileError: no such file.
        """
        with read_as(path, FORMAT):
            data = read_json(path, FORMAT, FORMAT_VERSION)
        try:
            return cls.from_dict(data, Path(path).parent)
        except (FileFormatError, BudgetError) as error:
            raise FileFormatError(f"{os.fspath(path)}: {error!s:.1000}") from error

    @classmethod
    def from_dict(cls, data: Any, folder: str | os.PathLike[str] | None = None) -> Self:
        """The plan that `to_dict` gave.

        Args:
            folder: where the file of its constants lies, if it has any.

        Raises:
            FileFormatError, BudgetError: `data` is not a plan, or its constants are not there; the message names no
                file but that of the constants.
        """
        check_format(data, FORMAT, FORMAT_VERSION)
        version = data["version"]
        may_lack = _FIELDS if version < 3 else _WITH_CONSTANTS  # version 2 was for plans with formats alone
        check_fields(data, _FIELDS_OF[version], "the plan", optional=may_lack, unknown="fields")
        capacities = data.get("capacities")
        if not isinstance(capacities, list):
            raise FileFormatError("'capacities' is missing or not a list")
        plan = cls(
            tuple(capacities),
            Policy.from_dict(data.get("policy")),
            Provenance.from_dict(data.get("provenance", {})),
            data.get("formats"),
            _constants_of(data, folder, len(capacities)),
        )
        if plan.mean_keys is None and "constants" in data:
            raise FileFormatError("it has constants, which a plan that stores no keys in fewer bits has no use for")
        return plan


def _constants_of(data: Mapping[str, Any], folder: str | os.PathLike[str] | None, layers: int) -> MeanKeys | None:
    if "constants" not in data:
        return None
    if folder is None:
        raise FileFormatError("the plan's constants lie in a file of their own; say in which folder")
    return read_constants(data["constants"], folder, layers)


AnyPlan = TypeVar("AnyPlan", bound=Plan)
"""The plan class of calls that return a plan of the class that they are given."""
