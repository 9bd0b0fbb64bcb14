"""The plan that every part shares: how many K/V slots each layer owns, and the policy that fills them.

This module sits below every other room of the package. It needs neither torch nor transformers to be read,
written or checked.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

from xkv_fx.engine_settings import engine_settings
from xkv_fx.errors import BudgetError, FileFormatError, ModelMismatchError
from xkv_fx.files import check_format, is_int, read_json, write_json

FORMAT = "xkv_fx.budgets"
FORMAT_VERSION = 1

Eviction = Literal["ring", "scored", "append", "none"]
EVICTIONS: tuple[str, ...] = get_args(Eviction)


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


class HasItemSize(Protocol):
    """A dtype: anything with its size in bytes, such as `torch.float16`."""

    @property
    def itemsize(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The shape of what one layer caches, as found in the captured graph.

    Attributes:
        query_heads: attention heads of the queries.
        kv_heads: heads of the cached keys and values (fewer than `query_heads` under GQA).
        key_dim, value_dim: head sizes of keys and values. With a `value_dim` of 0 the values are the keys themselves,
            stored once (multi-head latent attention: the latent, and its rotary key).
        itemsize: bytes of one cached element in the model's own dtype.
        sliding_window: the number of newest tokens that the layer attends to, or None for all of them.
    """

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int
    sliding_window: int | None = None

    def slot_bytes(self, dtype: HasItemSize | None = None) -> int:
        """Bytes that one slot takes over all KV heads, keys and values together, for one row."""
        itemsize = self.itemsize if dtype is None else dtype.itemsize
        return self.kv_heads * (self.key_dim + self.value_dim) * itemsize

    def effective_capacity(self, capacity: int) -> int:
        """`capacity`, clamped to the sliding window: older tokens are never attended to."""
        return capacity if self.sliding_window is None else min(capacity, self.sliding_window)


def layer_specs(layers: list[Any]) -> tuple[LayerSpec, ...]:
    """LayerSpecs from JSON objects, every number a whole one of at least 1, `value_dim` of at least 0.

    Raises:
        FileFormatError: they are not; the message does not name the file.
    """
    names = {field.name for field in dataclasses.fields(LayerSpec)}
    for layer, fields in enumerate(layers):
        if not isinstance(fields, dict) or set(fields) != names:
            raise FileFormatError(f"the fields of layer {layer} are not {', '.join(sorted(names))}")
        for name, value in fields.items():
            absent = name == "sliding_window" and value is None
            least = 0 if name == "value_dim" else 1
            if not absent and (not is_int(value) or value < least):
                raise FileFormatError(
                    f"{name} of layer {layer} is not a whole number of at least {least}: {value!r:.100}"
                )
    return tuple(LayerSpec(**fields) for fields in layers)


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
        BudgetError: an unknown eviction, a negative count, or an option that is not a finite number or a string.
    """

    scorer: str = "snapkv"
    scorer_options: Mapping[str, int | float | str] = dataclasses.field(default_factory=dict)
    eviction: Eviction = "ring"
    recent: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.eviction not in EVICTIONS:
            raise BudgetError(f"unknown eviction {self.eviction!r}; choose one of {', '.join(EVICTIONS)}")
        if not isinstance(self.scorer, str) or not self.scorer:
            raise BudgetError(f"the scorer must be the name of a registered scorer, not {self.scorer!r}")
        if self.recent is not None and (not is_int(self.recent) or self.recent < 1):
            raise BudgetError(f"recent must be a whole number of at least 1, or None; got {self.recent!r}")
        if not is_int(self.sinks) or self.sinks < 0:
            raise BudgetError(f"sinks must be a whole number of at least 0; got {self.sinks!r}")
        if not isinstance(self.scorer_options, Mapping):
            raise BudgetError(f"scorer_options must be a mapping of names to numbers; got {self.scorer_options!r}")
        options: dict[str, int | float | str] = {}
        for name, value in self.scorer_options.items():
            if not isinstance(name, str) or not (is_int(value) or _is_finite(value) or isinstance(value, str)):
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
        """The policy that a file holds, every field of it: one that is left out would quietly be today's default."""
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, dict):
            raise FileFormatError(f"a policy must be a JSON object, not {type(data).__name__}")
        unknown = sorted(set(data) - names)
        if unknown:
            names_of_unknown = ", ".join(map(repr, unknown))
            raise FileFormatError(f"unknown policy fields {names_of_unknown}; is the file of a newer xkv_fx?")
        policy = cls(**data)
        missing = sorted(names - set(data))
        if missing:
            raise FileFormatError(f"the policy lacks {', '.join(map(repr, missing))}; a file states every field of it")
        return policy


@dataclasses.dataclass(frozen=True)
class Provenance:
    """How a plan was made; None where it was written by hand.

    Attributes:
        model: fingerprint of the model that was measured. A plan with one is refused by every other model.
        allocator: the allocator's name.
        constraint: what was asked for, such as `{"fraction": 0.384}`.
        context: tokens of prompt that the capacities were solved for.
        source: SHA-256 of the profile or calibration that the plan was solved from.
        expected_retention: mean over layers of the share of attention mass that is kept.
        expected_kl: sum over layers of the divergence that a calibration measured at their capacities, nats.
        held_out: what `verify` measured on held-out prompts.

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

    def __post_init__(self) -> None:
        for name in ("model", "allocator", "source"):
            self._check(name, isinstance(getattr(self, name), str))
        for name in ("constraint", "held_out"):
            self._check(name, isinstance(getattr(self, name), Mapping))
        for name in ("expected_retention", "expected_kl"):
            self._check(name, is_int(getattr(self, name)) or _is_finite(getattr(self, name)))
        self._check("context", is_int(self.context))
        if self.context is not None:
            if self.context < 1:
                raise BudgetError(f"provenance field 'context' must be at least 1; got {self.context}")
            object.__setattr__(self, "context", int(self.context))

    def _check(self, name: str, good: bool) -> None:
        value = getattr(self, name)
        if value is not None and not good:
            raise BudgetError(f"provenance field {name!r} has the wrong type: {value!r}")

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Any) -> Provenance:
        if not isinstance(data, dict):
            raise FileFormatError(f"provenance must be a JSON object, not {type(data).__name__}")
        for name in data:
            if name not in {f.name for f in dataclasses.fields(cls)}:
                raise FileFormatError(f"unknown provenance field {name!r}; is the file of a newer xkv_fx?")
        return cls(**data)


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Per-layer KV cache capacities and the policy that they are valid for.

    Attributes:
        capacities: K/V slots of each layer that owns a cache, in execution order, *per KV head and row*; recent
            tokens are part of it.
        policy: how those slots are filled.
        provenance: how the plan was made.

    Raises:
        BudgetError: no layers, or a capacity that is not a whole number of at least 1.
    """

    capacities: tuple[int, ...]
    policy: Policy = Policy()
    provenance: Provenance = Provenance()

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

    @classmethod
    def uniform(cls, layers: int, tokens: int, policy: Policy | None = None) -> Budgets:
        """The same capacity of `tokens` slots for each of `layers` layers."""
        if not is_int(layers) or layers < 1:
            raise BudgetError(f"layers must be a whole number of at least 1; got {layers!r}")
        return cls((tokens,) * layers, policy or Policy(), Provenance(allocator="uniform"))

    @classmethod
    def full(cls, layers: int, tokens: int) -> Budgets:
        """Room for every one of `tokens` tokens in each layer: nothing is ever evicted, and more is an error."""
        return dataclasses.replace(
            cls.uniform(layers, tokens, Policy(eviction="none")), provenance=Provenance(allocator="full")
        )

    @property
    def total_tokens(self) -> int:
        """The sum of the capacities."""
        return sum(self.capacities)

    def check_layers(self, layers: Sequence[LayerSpec], model: str | None = None) -> None:
        """Check that this plan fits a model with these layers and, where both are known, this fingerprint.

        Raises:
            BudgetError: the number of capacities differs from the number of layers.
            ModelMismatchError: the plan was made for another model.
        """
        if len(self.capacities) != len(layers):
            raise BudgetError(
                f"the plan has {len(self.capacities)} capacities but the model has {len(layers)} layers that own a KV "
                "cache; give one capacity for each of them"
            )
        planned_for = self.provenance.model
        if planned_for is not None and model is not None and planned_for != model:
            raise ModelMismatchError(
                f"the plan was made for the model {planned_for!r}, not for {model!r}; profile and solve for this model"
            )

    def slots(self, layers: Sequence[LayerSpec], max_new_tokens: int = 0) -> tuple[int, ...]:
        """Slots that are really allocated for each layer.

        Under `eviction="append"` each layer gets room for `max_new_tokens` besides its capacity. Capacity and room
        together are clamped to the layer's sliding window: in that many slots nothing that it reaches is ever lost.

        Raises:
            BudgetError: another number of layers, or `max_new_tokens` is not a whole number of at least 0.
        """
        self.check_layers(layers)
        if not is_int(max_new_tokens) or max_new_tokens < 0:
            raise BudgetError(f"max_new_tokens must be a whole number of at least 0; got {max_new_tokens!r}")
        room = max_new_tokens if self.policy.eviction == "append" else 0
        return tuple(
            spec.effective_capacity(capacity + room) for spec, capacity in zip(layers, self.capacities, strict=True)
        )

    def kv_bytes(
        self, model: Any, batch_size: int = 1, dtype: HasItemSize | None = None, max_new_tokens: int = 0
    ) -> int:
        """Bytes that the K/V buffers of `batch_size` rows take.

        Args:
            model: a causal language model, a transformed one, or its `LayerSpec`s.
            batch_size: rows after expansion: batch x beams or return sequences.
            dtype: dtype of the cache; the model's own by default.
            max_new_tokens: room set aside for generated tokens; counts under `eviction="append"` only.

        Raises:
            BudgetError: another number of layers, or a count that is not a whole number in its range.
        """
        if not is_int(batch_size) or batch_size < 1:
            raise BudgetError(f"batch_size must be a whole number of at least 1; got {batch_size!r}")
        layers = layers_of(model)
        slots = self.slots(layers, max_new_tokens)
        return sum(n * spec.slot_bytes(dtype) for n, spec in zip(slots, layers, strict=True)) * batch_size

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON's types."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "capacities": list(self.capacities),
            "policy": self.policy.to_dict(),
            "provenance": self.provenance.to_dict(),
        }

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
        result = {"engine": engine, "settings": settings, "note": note}
        if path is not None:
            write_json(path, result)
        return result

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Budgets:
        """Read a plan that `save` wrote.

        Raises:
            FileFormatError: not a plan, damaged, or of a newer format; the message names the file.
            FileNotFoundError: no such file.
        """
        data = read_json(path, FORMAT, FORMAT_VERSION)
        try:
            return cls.from_dict(data)
        except (FileFormatError, BudgetError) as error:
            raise FileFormatError(f"{os.fspath(path)}: {error!s:.1000}") from error

    @classmethod
    def from_dict(cls, data: Any) -> Budgets:
        """The plan that `to_dict` gave.

        Raises:
            FileFormatError, BudgetError: it is none; the message names no file.
        """
        check_format(data, FORMAT, FORMAT_VERSION)
        unknown = sorted(set(data) - {"format", "version", "capacities", "policy", "provenance"})
        if unknown:
            raise FileFormatError(f"unknown fields {', '.join(map(repr, unknown))}")
        capacities = data.get("capacities")
        if not isinstance(capacities, list):
            raise FileFormatError("'capacities' is missing or not a list")
        return cls(
            tuple(capacities),
            Policy.from_dict(data.get("policy")),
            Provenance.from_dict(data.get("provenance", {})),
        )


ModelReader = Callable[[Any], tuple[LayerSpec, ...]]
_model_reader: ModelReader | None = None


def set_model_reader(reader: ModelReader) -> None:
    """Tell this module how to find the layers of a model. The package's face does so once; see `xkv_fx/__init__`."""
    global _model_reader
    _model_reader = reader


def layers_of(model: Any) -> tuple[LayerSpec, ...]:
    """The layers of a model that own a KV cache, in execution order; `model` may be that tuple itself."""
    if isinstance(model, Sequence) and all(isinstance(spec, LayerSpec) for spec in model):
        return tuple(model)
    layers = getattr(model, "layers", None)
    if isinstance(layers, tuple) and layers and all(isinstance(spec, LayerSpec) for spec in layers):
        return layers
    if _model_reader is None:
        raise BudgetError("give the model's LayerSpecs, or import xkv_fx, which knows how to read models")
    return _model_reader(model)
