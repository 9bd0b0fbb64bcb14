"""A calibration: how far the output strays when one layer or KV head alone holds less, and its file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from xkv_fx.errors import BudgetError, FileFormatError
from xkv_fx.fields import HEADER, LIST, NUMBER, OBJECT, TEXT, Fields, list_of, or_null, read_header, whole
from xkv_fx.files import check_safetensors_size, is_int, written_whole
from xkv_fx.formats import LayerFormats, codes_keys, pair_name
from xkv_fx.layers import LayerSpec, layer_fields, layer_specs
from xkv_fx.mean_keys import MeanKeys, arrays_of, check_fits, checked_mean_keys, mean_keys_of
from xkv_fx.planning.data.as_table import as_table
from xkv_fx.planning.data.by_head import checked_counts, joined_means, whole_layers
from xkv_fx.planning.data.grid import check_storable, checked_points
from xkv_fx.planning.data.hull import gain_curve, kl_curve
from xkv_fx.planning.data.measured_file import reading
from xkv_fx.planning.data.profile_data import check_context
from xkv_fx.policy import Policy

FORMAT = "xkv_fx.calibration"
FORMAT_VERSION = 4  # 1 has no formats, 2 no mean keys, 3 no single KV heads
MAX_CALIBRATION_BYTES = 256 * 2**20
_FIELDS: Fields = {
    "sha256": TEXT, "model": TEXT, "policy": OBJECT, "layers": LIST, "grid": list_of(NUMBER),
    "lengths": list_of(whole(1)), "continuation": whole(1),
}  # fmt: skip
_SINCE: Mapping[int, Fields] = {
    2: {"formats": LIST}, 4: {"formats": or_null(LIST), "heads": list_of(whole(1))},
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Measured KL divergence to the full cache, for each layer alone at several capacities, and in several formats.

    By KV head, each head of each layer stands in the place of a layer.

    Attributes:
        kl: mean over continuation tokens of KL(full || cut), nats, float32 `[prompts, layers, grid]`, read-only.
        grid: the capacities, ascending, as shares of the prompt tokens that a layer can hold, above 0 and below 1. With
            formats, those of one pair after another; that of each but the model's dtype ends with 1, all tokens.
        lengths: tokens of each prompt before its continuation.
        continuation: tokens that were fed after each prompt.
        policy: the policy that was measured: `eviction` says whether continuation tokens came on top of a capacity
            (`"append"`) or took the place of others (`"ring"`, `"scored"`).
        layers: the layers that own a KV cache, in execution order.
        model: fingerprint of the model.
        formats: of keys and values at each point of the grid, None for the model's dtype; None as a whole where all are
            in that. In the model's dtype, holding all tokens strays by nothing, and is not measured.
        mean_keys: of each layer over the tokens of the prompts, taken off the keys that were stored in fewer bits; None
            where nothing was.
        heads: how many KV heads each layer of the model has, where heads were measured: `layers` are then these heads
            one after another, each a spec of one KV head, and so is what belongs to each layer. None by layer.

    Raises:
        BudgetError: values of the wrong shape, negative or not finite; formats that a layer cannot be stored in, or
            mean keys that are not its own; heads that are not those of `layers`.
    """

    kl: NDArray[np.float32]
    grid: tuple[float, ...]
    lengths: tuple[int, ...]
    continuation: int
    policy: Policy
    layers: tuple[LayerSpec, ...]
    model: str
    formats: tuple[LayerFormats | None, ...] | None = None
    mean_keys: MeanKeys | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise BudgetError(f"policy must be an xkv_fx.Policy; got {type(self.policy).__name__}")
        if not isinstance(self.model, str) or not self.model:
            raise BudgetError(f"model must be the model's fingerprint, a non-empty string; got {self.model!r}")
        layers = tuple(self.layers)
        if not layers or not all(isinstance(spec, LayerSpec) for spec in layers):
            raise BudgetError("layers must be LayerSpecs, one for each layer that owns a KV cache; at least one")
        heads = checked_counts(self.heads, layers)
        lengths = tuple(check_context(length) for length in self.lengths)
        if not lengths:
            raise BudgetError("a calibration needs at least one prompt")
        if not is_int(self.continuation) or self.continuation < 1:
            raise BudgetError(f"continuation must be a whole number of at least 1; got {self.continuation!r}")
        grid, formats = checked_points(self.grid, self.formats)
        check_storable(formats or (), layers)
        kl = self.kl
        shape = (len(lengths), len(layers), len(grid))
        if not isinstance(kl, np.ndarray) or kl.dtype not in (np.float32, np.float64) or kl.shape != shape:
            found = getattr(kl, "dtype", type(kl)), getattr(kl, "shape", "")
            raise BudgetError(f"kl must be float32 [prompts, layers, grid] = {list(shape)}; got {found[0]} {found[1]}")
        for prompt, values in enumerate(kl):
            if not np.isfinite(values).all() or (values < 0).any():
                raise BudgetError(f"the KL divergences of prompt {prompt} hold NaN, an infinity or a negative value")
        kl = np.array(kl, dtype=np.float32, order="C")
        kl.flags.writeable = False
        means = checked_mean_keys(self.mean_keys, len(layers)) if any(map(codes_keys, formats or ())) else None
        for layer, (spec, mean) in enumerate(zip(layers, means or (), strict=False)):
            if mean is not None:
                check_fits(mean, layer, spec.kv_heads, spec.key_dim)
        checked = {
            "kl": kl, "grid": grid, "lengths": lengths, "layers": layers, "formats": formats, "mean_keys": means,
            "heads": heads,
        }  # fmt: skip
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return self.digest() == other.digest() if isinstance(other, Calibration) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.model, self.policy, self.layers, self.lengths))

    def __repr__(self) -> str:
        what = "layers" if self.heads is None else f"KV heads in {len(self.heads)} layers"
        return (
            f"<calibration of {self.model}: {len(self.layers)} {what}, {len(self.lengths)} prompts of up to "
            f"{self.context_default:,} tokens, formats {', '.join(map(pair_name, self.pairs))}, {self.policy.scorer}, "
            f"{self.policy.eviction}>"
        )

    def __str__(self) -> str:
        """A short table for each pair of formats: the mean KL of each layer at the shares that were measured."""
        what = "layer" if self.heads is None else "KV head"
        parts = [repr(self), f"KL to the full cache in nats when one {what} alone holds a share of the tokens"]
        for pair in self.pairs:
            shares, kl = self._points_of(pair)
            parts += [f"stored as {pair_name(pair)}", as_table([f"{share:.1%}" for share in shares], kl)]
        return "\n".join(parts)

    @property
    def context_default(self) -> int:
        """The context that plans are made for unless another is given: the longest prompt, continuation not counted."""
        return max(self.lengths)

    @property
    def statistics(self) -> dict[str, NDArray[np.float64]]:
        """What else was measured of each layer: nothing."""
        return {}

    @property
    def model_layers(self) -> tuple[LayerSpec, ...]:
        """The layers of the model that own a KV cache; `layers` unless heads were measured."""
        return self.layers if self.heads is None else whole_layers(self.layers, self.heads)

    @property
    def layer_mean_keys(self) -> MeanKeys | None:
        """`mean_keys` of these layers."""
        return self.mean_keys if self.heads is None else joined_means(self.mean_keys, self.heads)

    @property
    def pairs(self) -> tuple[LayerFormats | None, ...]:
        """The formats of keys and values that were measured, None for the model's dtype."""
        return (None,) if self.formats is None else tuple(dict.fromkeys(self.formats))

    def kl_curves(self, context: int) -> NDArray[np.float64]:
        """The mean KL of each layer alone in each of `pairs`, holding c of `context` tokens: float64
        `[pairs, layers, context + 1]`, nats, nowhere rising. Where more tokens were measured to be worse, that is taken
        for chance.

        Raises:
            BudgetError: a context that is not a whole number of at least 1.
        """
        check_context(context)
        curves = np.empty((len(self.pairs), len(self.layers), context + 1))
        for pair, of_pair in zip(self.pairs, curves, strict=True):
            shares, kl = self._points_of(pair)
            for spec, measured, curve in zip(self.layers, kl, of_pair, strict=True):
                held = spec.effective_capacity(context)
                curve[: held + 1] = kl_curve(shares, np.minimum.accumulate(measured), held)
                curve[held + 1 :] = curve[held]
        return curves

    def least_shares(self) -> NDArray[np.float64]:
        """The smallest share of tokens that was measured in each of `pairs`: float64 `[pairs]`."""
        return np.array([self._points_of(pair)[0][0] for pair in self.pairs])

    def _points_of(self, pair: LayerFormats | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Shares `[points]`, the last one 1, and the mean KL `[layers, points]` that was measured there."""
        formats = self.formats or (None,) * len(self.grid)
        at = [point for point, measured in enumerate(formats) if measured == pair]
        shares, kl = np.array(self.grid)[at], self.kl.mean(0, dtype=np.float64)[:, at]
        if pair is None:
            shares, kl = np.append(shares, 1.0), np.pad(kl, ((0, 0), (0, 1)))
        return shares, kl

    def mean_curve(self, context: int) -> NDArray[np.float64]:
        """What each layer gains by holding c of `context` tokens instead of none: float64 `[layers, context + 1]`,
        nats, concave. Its rise from c to full capacity is the mean KL at c; see `gain_curve`.

        For a layer with a sliding window, shares are of what the layer can hold of the context.

        Raises:
            BudgetError: a context that is not a whole number of at least 1, or formats were measured; `kl_curves` has
                theirs.
        """
        check_context(context)
        if self.formats is not None:
            raise BudgetError("this calibration is of several formats; kl_curves gives the divergences in each of them")
        mean = self.kl.mean(0, dtype=np.float64)
        curves = np.empty((len(self.layers), context + 1))
        for layer, spec in enumerate(self.layers):
            held = spec.effective_capacity(context)
            curves[layer, : held + 1] = gain_curve(np.array(self.grid), mean[layer], held)
            curves[layer, held + 1 :] = curves[layer, held]
        return curves

    def expected_kl(
        self,
        capacities: Sequence[int],
        context: int | None = None,
        formats: Sequence[LayerFormats | None] | None = None,
    ) -> float:
        """The sum over layers of the mean KL at these capacities, nats: what a plan would cost if layers only added up.

        Args:
            capacities: one of each layer.
            context: tokens of prompt; the longest one by default.
            formats: of each layer; None for the model's dtype.

        Raises:
            BudgetError: another number of capacities or formats, values out of range, or formats not measured.
        """
        context = self.context_default if context is None else check_context(context)
        layers = len(self.layers)
        if len(capacities) != layers:
            raise BudgetError(f"{len(capacities)} capacities were given for a calibration of {layers} layers")
        if not all(is_int(capacity) and capacity >= 1 for capacity in capacities):
            raise BudgetError("capacities must be whole numbers of at least 1")
        held = [min(int(capacity), context) for capacity in capacities]
        pairs = (None,) * layers if formats is None else tuple(formats)
        if len(pairs) != layers:
            raise BudgetError(f"formats of {len(pairs)} layers were given for a calibration of {layers} layers")
        unknown = [pair for pair in pairs if pair not in self.pairs]
        if unknown:
            measured = ", ".join(map(pair_name, self.pairs))
            raise BudgetError(
                f"{pair_name(unknown[0])} was not measured; the formats of this calibration are {measured}"
            )
        if self.formats is None:
            curves = self.mean_curve(context)
            return float(sum(curve[-1] - curve[c] for curve, c in zip(curves, held, strict=True)))
        found = self.kl_curves(context)[[self.pairs.index(pair) for pair in pairs], range(layers), held]
        return float(found.sum())

    def digest(self) -> str:
        """SHA-256 over everything that the calibration holds, in hexadecimal."""
        digest = hashlib.sha256(self._description().encode())
        digest.update(np.ascontiguousarray(self.kl, dtype="<f4").data)
        for mean in self.mean_keys or ():
            digest.update(b"" if mean is None else mean.digest.encode())
        return digest.hexdigest()

    def _description(self) -> str:
        """Everything but the divergences, as JSON that is the same for equal content."""
        description = {
            "model": self.model,
            "policy": self.policy.to_dict(),
            "layers": layer_fields(self.layers),
            "grid": list(self.grid),
            "lengths": list(self.lengths),
            "continuation": self.continuation,
        }
        if self.formats is not None:
            description["formats"] = [None if pair is None else list(pair) for pair in self.formats]
        if self.heads is not None:
            description = {"formats": None, **description, "heads": list(self.heads)}
        return json.dumps(description, sort_keys=True, default=operator.index)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration as a safetensors file; it appears whole or not at all.

        It is of the oldest version that can say all of it: 4 with single KV heads, 3 with mean keys, 2 with formats.
        """
        version = 3 if self.mean_keys is not None else 1 if self.formats is None else 2
        header = {
            "format": FORMAT,
            "version": version if self.heads is None else 4,
            "sha256": self.digest(),
            **json.loads(self._description()),
        }
        with written_whole(path) as temporary:
            arrays = {"kl": np.asarray(self.kl), **arrays_of(self.mean_keys or ())}
            safetensors.numpy.save_file(arrays, temporary, {HEADER: json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a calibration that `save` wrote.

        Raises:
            FileFormatError: not a calibration, damaged, cut off, or of a newer format; the message names the file.
            MissingFileError: no such file.
        """
        with reading(path, FORMAT, "Calibrate again."):
            check_safetensors_size(path, MAX_CALIBRATION_BYTES)
            with safetensors.safe_open(os.fspath(path), framework="np") as file:
                header = read_header(file.metadata(), FORMAT, FORMAT_VERSION, _FIELDS, since=_SINCE)
                names = set(file.keys())
                with_means = header["version"] == 3 or (header["version"] > 3 and len(names) > 1)
                if "kl" not in names or (len(names) > 1) != with_means:
                    raise FileFormatError(
                        f"it does not hold an array 'kl'{' and mean keys' if with_means else ' alone'}"
                    )
                if any(file.get_slice(name).get_dtype() != "F32" for name in names):
                    raise FileFormatError("its arrays are not of float32")
                arrays = {name: file.get_tensor(name) for name in names}
                kl = arrays.pop("kl")
            calibration = cls(
                kl=kl,
                grid=tuple(header["grid"]),
                lengths=tuple(header["lengths"]),
                continuation=header["continuation"],
                policy=Policy.from_dict(header["policy"]),
                layers=layer_specs(header["layers"]),
                model=header["model"],
                formats=header.get("formats"),
                mean_keys=mean_keys_of(arrays, len(header["layers"])),
                heads=header.get("heads"),
            )
            if calibration.digest() != header["sha256"]:
                raise FileFormatError("its content does not match its checksum; it is damaged, so calibrate again")
            return calibration
