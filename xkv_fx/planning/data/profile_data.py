"""A profile: the retention curves that were measured on some prompts, and its file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from xkv_fx.errors import BudgetError, FileFormatError
from xkv_fx.fields import HEADER, LIST, OBJECT, TEXT, Fields, list_of, read_header, whole
from xkv_fx.files import check_safetensors_size, is_int, written_whole
from xkv_fx.layers import LayerSpec, layer_fields, layer_specs
from xkv_fx.planning.data.as_table import as_table
from xkv_fx.planning.data.by_head import checked_counts, whole_layers
from xkv_fx.planning.data.curves import mean_retention, rescale
from xkv_fx.planning.data.measured_file import reading
from xkv_fx.policy import Policy

FORMAT = "xkv_fx.profile"
FORMAT_VERSION = 2  # 1 has no single KV heads
MAX_PROFILE_BYTES = 8 * 1024**3  # 190 prompts of 131,072 tokens in 80 layers
_SHOWN = (0.0625, 0.125, 0.25, 0.5, 0.75)
_FIELDS: Fields = {"sha256": TEXT, "model": TEXT, "policy": OBJECT, "layers": LIST, "layer_means": OBJECT}
_SINCE: Mapping[int, Fields] = {2: {"heads": list_of(whole(1))}}
MASS = "mass"
"""In `layer_means` by KV head: the scores of a head together, their mean over all heads being 1."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """Retention curves of a model's layers, one set for each profiled prompt.

    Attributes:
        curves: float32 `[layers, length + 1]` for each prompt, read-only; see `planning.curves.retention_curve`.
        policy: the policy that the curves were measured for.
        layers: the layers that own a KV cache, in execution order.
        model: fingerprint of the model.
        layer_means: what else was measured, by name: for each layer a finite number, the mean over prompts.
            The allocators `"entropy"` and `"squeeze"` need `"preference"` and `"similarity"`.
        heads: how many KV heads each layer of the model has, where heads were profiled: `layers` are then these heads
            one after another, each a spec of one KV head, and each has a curve. None by layer.

    Raises:
        BudgetError: no prompts, or curves that do not run from 0 to 1 without falling, one for each layer.
    """

    curves: tuple[NDArray[np.float32], ...]
    policy: Policy
    layers: tuple[LayerSpec, ...]
    model: str
    layer_means: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise BudgetError(f"policy must be an xkv_fx.Policy; got {type(self.policy).__name__}")
        if not isinstance(self.model, str) or not self.model:
            raise BudgetError(f"model must be the model's fingerprint, a non-empty string; got {self.model!r}")
        layers, curves = tuple(self.layers), tuple(self.curves)
        if not layers or not all(isinstance(spec, LayerSpec) for spec in layers):
            raise BudgetError("layers must be LayerSpecs, one for each layer that owns a KV cache; at least one")
        if not curves:
            raise BudgetError("a profile needs the curves of at least one prompt")
        means = {str(name): _checked_means(name, values, len(layers)) for name, values in self.layer_means.items()}
        object.__setattr__(self, "layer_means", dict(sorted(means.items())))
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "heads", checked_counts(self.heads, layers))
        object.__setattr__(self, "curves", tuple(_frozen(c, i, len(layers)) for i, c in enumerate(curves)))

    def __eq__(self, other: object) -> bool:
        return self.digest() == other.digest() if isinstance(other, Profile) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.model, self.policy, self.layers, self.lengths))

    def __repr__(self) -> str:
        what = "layers" if self.heads is None else f"KV heads in {len(self.heads)} layers"
        return (
            f"<profile of {self.model}: {len(self.layers)} {what}, {len(self.curves)} prompts of up to "
            f"{self.context_default:,} tokens, {self.policy.scorer}, {self.policy.eviction}>"
        )

    def __str__(self) -> str:
        """A short table: what each layer keeps at some shares of the longest prompt, the mean over prompts."""
        context = self.context_default
        held = [max(1, round(share * context)) for share in _SHOWN]
        table = as_table([f"{share:.1%}" for share in _SHOWN], self.mean_curve(context)[:, held])
        return f"{self!r}\nattention mass that a layer keeps when it holds a share of the tokens\n{table}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each profiled prompt."""
        return tuple(curves.shape[1] - 1 for curves in self.curves)

    @property
    def model_layers(self) -> tuple[LayerSpec, ...]:
        """The layers of the model that own a KV cache; `layers` unless heads were profiled."""
        return self.layers if self.heads is None else whole_layers(self.layers, self.heads)

    @property
    def context_default(self) -> int:
        """The context that plans are made for unless another is given: the longest profiled prompt."""
        return max(self.lengths)

    @property
    def statistics(self) -> dict[str, NDArray[np.float64]]:
        """`layer_means` as arrays, float64 `[layers]`."""
        return {name: np.array(values) for name, values in self.layer_means.items()}

    def mean_curve(self, context: int) -> NDArray[np.float64]:
        """Each layer's curve for prompts of `context` tokens, the mean over prompts: float64 `[layers, context + 1]`.

        Curves are rescaled on c / length. For a layer with a sliding window, length is the most that the layer can
        hold of the prompt: a longer prompt does not lengthen its curve, and a full sliding window keeps everything.

        Raises:
            BudgetError: a context that is not a whole number of at least 1.
        """
        check_context(context)
        mean = np.zeros((len(self.layers), context + 1))
        for curves, length in zip(self.curves, self.lengths, strict=True):
            for spec, curve, total in zip(self.layers, curves, mean, strict=True):
                held, to_hold = (spec.effective_capacity(tokens) for tokens in (length, context))
                if held < length:
                    curve = curve[: held + 1].copy()
                    curve[held] = 1.0
                total[: to_hold + 1] += rescale(curve, to_hold)
                total[to_hold + 1 :] += 1.0
        if len(self.curves) > 1:
            mean /= len(self.curves)
        return mean

    def objective(self, context: int) -> NDArray[np.float64]:
        """What the allocator `"xkv"` makes as large as it can be: `mean_curve`, by KV head each times the mass of its
        head, so that heads are pooled by their scores."""
        curves = self.mean_curve(context)
        return curves * np.array(self.layer_means[MASS])[:, None] if MASS in self.layer_means else curves

    def retention(self, capacities: Sequence[int], context: int | None = None) -> float:
        """The mean over layers of the share of attention mass that these capacities keep.

        Args:
            capacities: one whole number of at least 1 for each layer.
            context: tokens of prompt; the longest profiled prompt by default.

        Raises:
            BudgetError: another number of capacities, or values out of range.
        """
        context = self.context_default if context is None else check_context(context)
        if len(capacities) != len(self.layers):
            raise BudgetError(f"{len(capacities)} capacities were given for a profile of {len(self.layers)} layers")
        for layer, capacity in enumerate(capacities):
            if not is_int(capacity) or capacity < 1:
                raise BudgetError(
                    f"the capacity of layer {layer} must be a whole number of at least 1; got {capacity!r}"
                )
        return mean_retention(self.mean_curve(context), [min(int(c), context) for c in capacities])

    def digest(self) -> str:
        """SHA-256 over everything that the profile holds, in hexadecimal."""
        return self._digest

    @functools.cached_property  # of curves that may be gigabytes, for every plan
    def _digest(self) -> str:
        digest = hashlib.sha256(self._description().encode())
        for curves in self.curves:
            digest.update(f"{curves.shape}".encode())
            digest.update(np.ascontiguousarray(curves, dtype="<f4").data)
        return digest.hexdigest()

    def _description(self) -> str:
        """Everything but the curves, as JSON that is the same for equal content."""
        description = {
            "model": self.model,
            "policy": self.policy.to_dict(),
            "layers": layer_fields(self.layers),
            "layer_means": {name: list(values) for name, values in self.layer_means.items()},
            **({} if self.heads is None else {"heads": list(self.heads)}),
        }
        return json.dumps(description, sort_keys=True, default=operator.index)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as a safetensors file; it appears whole or not at all."""
        header = {
            "format": FORMAT,
            "version": 1 if self.heads is None else 2,
            "sha256": self.digest(),
            **json.loads(self._description()),
        }
        tensors = {_tensor_name(prompt): np.asarray(curves) for prompt, curves in enumerate(self.curves)}
        with written_whole(path) as temporary:
            safetensors.numpy.save_file(tensors, temporary, {HEADER: json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile that `save` wrote.

        Raises:
            FileFormatError: not a profile, damaged, cut off, or of a newer format; the message names the file.
            MissingFileError: no such file.
        """
        with reading(path, FORMAT, "Profile again."):
            check_safetensors_size(path, MAX_PROFILE_BYTES)
            with safetensors.safe_open(os.fspath(path), framework="np") as file:
                header = read_header(file.metadata(), FORMAT, FORMAT_VERSION, _FIELDS, since=_SINCE)
                curves = _read_curves(file, len(header["layers"]))
            profile = cls(
                curves,
                Policy.from_dict(header["policy"]),
                layer_specs(header["layers"]),
                header["model"],
                header["layer_means"],
                header.get("heads"),
            )
            if profile.digest() != header["sha256"]:
                raise FileFormatError("its content does not match its checksum; it is damaged, so profile again")
            return profile


def check_context(context: Any) -> int:
    """The context as a Python int.

    Raises:
        BudgetError: not a whole number of at least 1.
    """
    if not is_int(context) or context < 1:
        raise BudgetError(f"context must be a whole number of at least 1; got {context!r}")
    return int(context)


def _frozen(curves: Any, prompt: int, layers: int) -> NDArray[np.float32]:
    """A read-only float32 copy of one prompt's curves, checked."""
    if not isinstance(curves, np.ndarray) or curves.dtype not in (np.float32, np.float64):
        raise BudgetError(
            f"the curves of prompt {prompt} must be float32; got {getattr(curves, 'dtype', type(curves))}"
        )
    if curves.ndim != 2 or curves.shape[0] != layers or curves.shape[1] < 2:
        raise BudgetError(f"the curves of prompt {prompt} must be [{layers}, length + 1]; got shape {curves.shape}")
    copy = np.array(curves, dtype=np.float32, order="C")
    for layer, curve in enumerate(copy):
        where = f"the curve of layer {layer} in prompt {prompt}"
        if not np.isfinite(curve).all():
            raise BudgetError(f"{where} holds NaN or an infinity")
        if (curve[1:] < curve[:-1]).any():
            raise BudgetError(f"{where} falls; keeping more tokens cannot keep less")
        if curve[0] != 0.0 or curve[-1] != 1.0:
            raise BudgetError(f"{where} must run from 0 to 1; it runs from {curve[0]} to {curve[-1]}")
    copy.flags.writeable = False
    return copy


def _checked_means(name: object, values: Any, layers: int) -> tuple[float, ...]:
    """One number of each layer, or the reason why these cannot be used."""
    numbers = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else ()
    if len(numbers) != layers or not all(map(_is_finite_number, numbers)):
        raise BudgetError(f"{name!r} must be {layers} finite numbers, one a layer; got {values!r:.200}")
    return tuple(float(value) for value in numbers)


def _is_finite_number(value: object) -> bool:
    """Of Python's numbers or numpy's; not for a whole number too large for a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _tensor_name(prompt: int) -> str:
    return f"curves.{prompt}"


def _read_curves(file: Any, layers: int) -> tuple[NDArray[np.float32], ...]:
    """The arrays of an open safetensors file; names, dtypes and shapes are checked before the data is read."""
    names = [_tensor_name(prompt) for prompt in range(len(file.keys()))]
    if set(names) != set(file.keys()):
        raise FileFormatError("its arrays are not named curves.0, curves.1, ...")
    for name in names:
        described = file.get_slice(name)
        shape = described.get_shape()
        if described.get_dtype() != "F32" or len(shape) != 2 or shape[0] != layers:
            raise FileFormatError(f"{name} is {described.get_dtype()} {shape} instead of F32 [{layers}, length + 1]")
    return tuple(file.get_tensor(name) for name in names)
