"""The plan that every part shares: how many K/V slots each layer or KV head owns, and the policy that fills them.

This module sits below every subpackage. A plan needs neither torch nor transformers to be read, written or
checked. Users hold an `xkv_fx.Budgets`, which is a `Plan` that can also read a transformers model.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Self, TypeVar

from xkv_fx.engine_settings import engine_settings
from xkv_fx.errors import BudgetError, FileFormatError, ModelMismatchError
from xkv_fx.fields import ANYTHING, DOCUMENT, LIST, OBJECT, Fields, check_fields, or_null
from xkv_fx.file_kinds import read_as
from xkv_fx.files import check_format, is_int, read_json, write_json
from xkv_fx.formats import PlannedFormats, checked_formats, codes_keys, formats_of_heads, is_by_head
from xkv_fx.heads import HeadGroup, group_heads
from xkv_fx.layers import HasItemSize, Layers, LayerSpec, layers_of
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
from xkv_fx.provenance import SINCE_VERSION_3
from xkv_fx.provenance import Provenance as Provenance

FORMAT = "xkv_fx.budgets"
# Version 1 has no formats, 2 no constants, and no bytes and sliding windows in its provenance, 3 no plans by KV head.
FORMAT_VERSION = 4
CONSTANTS = "constants.safetensors"
"""The file of a plan's constants, where nothing else names it."""
# Each part checks its own fields.
_FIELDS: Fields = {**DOCUMENT, **dict.fromkeys(("capacities", "policy", "provenance"), ANYTHING)}
_WITH_FORMATS: Fields = {**_FIELDS, "formats": LIST}
_WITH_CONSTANTS: Fields = {**_WITH_FORMATS, "constants": OBJECT}
_BY_HEAD: Fields = {**_WITH_CONSTANTS, "formats": or_null(LIST)}
_FIELDS_OF: Mapping[int, Fields] = {1: _FIELDS, 2: _WITH_FORMATS, 3: _WITH_CONSTANTS, 4: _BY_HEAD}

Capacity = int | tuple[int, ...]
"""Slots of every KV head of a layer, or of each of them."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """KV cache capacities of layers or of their KV heads, and the policy that they are valid for.

    Plans with equal content are equal, whatever their subclass.

    Attributes:
        capacities: K/V slots of each layer that owns a cache, in execution order, *per KV head and row*; recent
            tokens are part of it. A tuple in the place of a number has one number for each KV head of the layer.
        policy: how those slots are filled.
        provenance: how the plan was made.
        formats: how each layer stores its slots: a pair of names of `xkv_fx.formats`, of its keys and of its values,
            or None for the model's dtype, or a tuple of these, one for each KV head; None as a whole if everything is
            in the model's dtype.
        mean_keys: what is subtracted from each layer's keys before they are stored in fewer bits: a `MeanKey` or its
            numbers, float32 `[kv_heads, key_dim]`, or None for nothing. None as a whole if nothing is subtracted
            anywhere, or no layer stores its keys in fewer bits.

    Raises:
        BudgetError: no layers, a capacity that is not a whole number of at least 1, or formats or mean keys that are
            unknown or not one for each capacity.
    """

    capacities: tuple[Capacity, ...]
    policy: Policy = dataclasses.field(default_factory=Policy)
    provenance: Provenance = dataclasses.field(default_factory=Provenance)
    formats: tuple[PlannedFormats, ...] | None = None
    mean_keys: MeanKeys | None = None

    def __post_init__(self) -> None:
        if isinstance(self.capacities, str | bytes | bytearray) or not isinstance(self.capacities, Sequence):
            raise BudgetError(f"capacities must be a sequence of whole numbers; got {type(self.capacities).__name__}")
        if not self.capacities:
            raise BudgetError("capacities is empty; give one whole number for each layer that owns a cache")
        checked = tuple(_checked_capacity(capacity, f"layer {layer}") for layer, capacity in enumerate(self.capacities))
        object.__setattr__(self, "capacities", checked)
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
    def by_head(self) -> bool:
        """Whether any layer is planned by KV head."""
        return any(isinstance(capacity, tuple) for capacity in self.capacities) or any(
            map(is_by_head, self.layer_formats)
        )

    @property
    def every_capacity(self) -> tuple[int, ...]:
        """Each number of the plan: of layers, and of the KV heads of layers that are planned by head."""
        return tuple(itertools.chain.from_iterable(c if isinstance(c, tuple) else (c,) for c in self.capacities))

    @property
    def layer_means(self) -> tuple[int, ...]:
        """The capacity of each layer; of one planned by KV head the mean over its heads, rounded down."""
        return tuple(
            sum(capacity) // len(capacity) if isinstance(capacity, tuple) else capacity for capacity in self.capacities
        )

    @property
    def total_tokens(self) -> int:
        """The sum of the capacities. A layer planned by KV head counts the mean over its heads; the sum is rounded
        down."""
        each = (Fraction(sum(c), len(c)) if isinstance(c, tuple) else Fraction(c) for c in self.capacities)
        return int(sum(each))

    @property
    def layer_formats(self) -> tuple[PlannedFormats, ...]:
        """The formats of each layer, None for the model's dtype."""
        return (None,) * len(self.capacities) if self.formats is None else self.formats

    @property
    def recent(self) -> tuple[Capacity, ...]:
        """The newest tokens that each layer always keeps, or each of its KV heads where they have capacities of their
        own. What holds its whole sliding window keeps just that; of a plan by hand, which knows nothing of windows, it
        is what the policy says."""
        windows = self.provenance.sliding_windows or (None,) * len(self.capacities)

        def kept(capacity: int, window: int | None) -> int:
            return window if window is not None and capacity >= window else self.policy.recent_for(capacity)

        return tuple(
            tuple(kept(of_head, window) for of_head in capacity)
            if isinstance(capacity, tuple)
            else kept(capacity, window)
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
            BudgetError: the number of capacities differs from the number of layers, or that of a layer planned by KV
                head from the number of its heads; a layer cannot be stored in its formats, or its mean key is of other
                shape than its keys.
            ModelMismatchError: the plan was made for another model.
        """
        specs = layers_of(layers)
        count = len(specs)
        if len(self.capacities) != count:
            raise BudgetError(
                f"the plan has {len(self.capacities)} capacities but the model has {count} layers that own a KV "
                "cache; give one capacity for each of them"
            )
        for layer, (spec, capacity, formats) in enumerate(zip(specs, self.capacities, self.layer_formats, strict=True)):
            for what, planned in (("capacities", capacity), ("formats", formats if is_by_head(formats) else 0)):
                if isinstance(planned, tuple) and len(planned) != spec.kv_heads:
                    raise BudgetError(
                        f"the plan has {len(planned)} {what} for the KV heads of layer {layer}, which has "
                        f"{spec.kv_heads}; give one for each of them"
                    )
            _check_storable(layer, spec, formats)
        for layer, (spec, mean) in enumerate(zip(specs, self.mean_keys or (), strict=False)):
            if mean is not None:
                check_fits(mean, layer, spec.kv_heads, spec.key_dim)
        planned_for = self.provenance.model
        if planned_for is not None and model is not None and planned_for != model:
            raise ModelMismatchError(
                f"the plan was made for the model {planned_for!r}, not for {model!r}; profile and solve for this model"
            )

    def groups(self, layers: Layers) -> tuple[HeadGroup, ...]:
        """The KV heads of each layer that share a cache: those of equal capacities, clamped to the layer's sliding
        window, and equal formats. A layer whose heads are all alike is one group.

        Raises:
            BudgetError: as `check_layers`.
        """
        self.check_layers(layers)
        found: list[HeadGroup] = []
        planned = zip(layers_of(layers), self.capacities, self.layer_formats, strict=True)
        for layer, (spec, capacity, formats) in enumerate(planned):
            each = capacity if isinstance(capacity, tuple) else (capacity,) * spec.kv_heads
            found += group_heads(layer, spec, each, formats_of_heads(formats, spec.kv_heads))
        return tuple(found)

    def slots(self, layers: Layers, max_new_tokens: int = 0) -> tuple[Capacity, ...]:
        """Slots that are actually allocated for each layer, or for each of its KV heads where the plan has their
        capacities.

        Under `eviction="append"` each layer gets room for `max_new_tokens` besides its capacity. Capacity and room
        together are clamped to the layer's sliding window: with that many slots, no token in the window is lost.

        Raises:
            BudgetError: as `check_layers`, or `max_new_tokens` is not a whole number of at least 0.
        """
        self.check_layers(layers)
        room = self.room_for(max_new_tokens)

        def clamped(spec: LayerSpec, capacity: Capacity) -> Capacity:
            if isinstance(capacity, tuple):
                return tuple(spec.effective_capacity(of_head + room) for of_head in capacity)
            return spec.effective_capacity(capacity + room)

        return tuple(map(clamped, layers_of(layers), self.capacities))

    def room_for(self, max_new_tokens: int) -> int:
        """Slots that are set aside for so many generated tokens.

        Raises:
            BudgetError: not a whole number of at least 0.
        """
        if not is_int(max_new_tokens) or max_new_tokens < 0:
            raise BudgetError(f"max_new_tokens must be a whole number of at least 0; got {max_new_tokens!r}")
        return max_new_tokens if self.policy.eviction == "append" else 0

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
        layers, room = layers_of(model), self.room_for(max_new_tokens)
        of_row = 0
        for group in self.groups(layers):
            spec = group.spec_in(layers[group.layer])
            of_row += spec.effective_capacity(group.capacity + room) * spec.slot_bytes(dtype, group.formats)
        return of_row * batch_size

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
        version = 1 if self.formats is None else 2
        if self.mean_keys is not None or any(name in provenance for name in SINCE_VERSION_3):
            version = 3
        if self.by_head:
            version = 4
        data: dict[str, Any] = {
            "format": FORMAT,
            "version": version,
            "capacities": [_as_lists(capacity) for capacity in self.capacities],
            "policy": self.policy.to_dict(),
            "provenance": provenance,
        }
        if self.formats is not None or version == 4:
            data["formats"] = None if self.formats is None else [_as_lists(of_layer) for of_layer in self.formats]
        if self.mean_keys is not None:
            data["constants"] = reference_to(constants, self.mean_keys)
        return data

    def to(self, engine: str, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """This plan in another engine's own settings. These engines keep the newest tokens only (and sinks): what the
        policy's scorer would keep of the middle of a prompt is lost there, so measured quality does not carry over.

        - `"tensorrt-llm"`: arguments of its `KvCacheConfig`, one size a layer.
        - `"executorch"`: the argument of its `replace_kv_cache_with_ring_kv_cache`, one ring a layer; no sinks.
        - `"openvino"`: arguments of OpenVINO GenAI's `CacheEvictionConfig`. It has one size for all layers, so only the
          plan's total carries over: the mean capacity, rounded down to whole blocks of 32 tokens.

        None of them has a size a KV head: a layer planned by head gets the mean of its heads, rounded down.

        Args:
            engine: one of these names.
            path: where to write the same as JSON, if anywhere.

        Returns:
            `engine`, `settings`, and a `note` that says what is lost.

        Raises:
            BudgetError: an unknown engine, or a plan too small for its blocks.
        """
        settings, note = engine_settings(engine, self.layer_means, self.policy.sinks)
        if self.by_head:
            note += (
                "; it has no sizes of single KV heads, so those are lost: a layer planned by head gets the mean of its "
                "heads, rounded down"
            )
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
        if plan.by_head and version < 4:
            raise FileFormatError(f"version {version} has no capacities or formats of single KV heads")
        return plan


def _checked_capacity(capacity: Any, where: str) -> Capacity:
    """One whole number, or a tuple of them where heads have their own."""
    if isinstance(capacity, list | tuple):
        if not capacity:
            raise BudgetError(f"the capacity of {where} is an empty sequence; give one number for each KV head")
        return tuple(_checked_count(of_head, f"{where}, KV head {head}") for head, of_head in enumerate(capacity))
    return _checked_count(capacity, where)


def _checked_count(capacity: Any, where: str) -> int:
    if not is_int(capacity):
        raise BudgetError(f"the capacity of {where} must be a whole number; got {capacity!r:.100}")
    if capacity < 1:
        raise BudgetError(f"the capacity of {where} must be at least 1; got {capacity}")
    return int(capacity)


def _check_storable(layer: int, spec: LayerSpec, formats: PlannedFormats) -> None:
    for pair in dict.fromkeys(formats_of_heads(formats, spec.kv_heads)):
        if pair is None:
            continue
        try:
            spec.slot_bytes(formats=pair)
        except BudgetError as error:
            stored = f"the plan stores keys of layer {layer} as {pair[0]} and its values as {pair[1]}"
            raise BudgetError(f"{stored}, but {error}") from error


def _as_lists(value: Any) -> Any:
    """A value as JSON's types: tuples as lists."""
    return [_as_lists(one) for one in value] if isinstance(value, tuple) else value


def _constants_of(data: Mapping[str, Any], folder: str | os.PathLike[str] | None, layers: int) -> MeanKeys | None:
    if "constants" not in data:
        return None
    if folder is None:
        raise FileFormatError("the plan's constants lie in a file of their own; say in which folder")
    return read_constants(data["constants"], folder, layers)


AnyPlan = TypeVar("AnyPlan", bound=Plan)
"""The plan class of calls that return a plan of the class that they are given."""
