"""Mean keys: constants of a plan that are subtracted from keys before these are stored in fewer bits.

Some channels of the keys are large for every token, whatever the text (KIVI, arXiv 2402.02750, section 3.2). What is
left without the mean needs smaller scales. The mean is known ahead of time, so it costs no bytes a token.

numpy is loaded once there are any: most plans have none.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from xkv_fx.errors import BudgetError, FileFormatError
from xkv_fx.fields import TEXT, check_fields
from xkv_fx.files import written_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_CONSTANTS_BYTES = 64 * 2**20
_SUFFIX = ".safetensors"
_NAME = "key_mean_{}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MeanKey:
    """The mean key of each KV head of a layer, as keys are cached: rotated by their positions.

    Those with equal numbers are equal.

    Attributes:
        values: float32 `[kv_heads, key_dim]`, read-only.

    Raises:
        BudgetError: another shape, no numbers, or numbers that are not finite.
    """

    values: NDArray[np.float32]

    def __post_init__(self) -> None:
        import numpy as np

        values = self.values
        if not isinstance(values, np.ndarray) or values.ndim != 2 or not np.issubdtype(values.dtype, np.floating):
            found = getattr(values, "dtype", type(values).__name__), list(getattr(values, "shape", ()))
            raise BudgetError(
                f"a mean key must be a numpy array of float32 [kv_heads, key_dim]; got {found[0]} {found[1]}"
            )
        with np.errstate(over="ignore"):  # refused right below
            values = np.array(values, dtype=np.float32, order="C")
        if not values.size or not np.isfinite(values).all():
            raise BudgetError("a mean key must have finite numbers, at least one for each of its heads")
        values.flags.writeable = False
        object.__setattr__(self, "values", values)

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, MeanKey) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"MeanKey({self.kv_heads} x {self.key_dim}, {self.digest})"

    @property
    def kv_heads(self) -> int:
        return int(self.values.shape[0])

    @property
    def key_dim(self) -> int:
        return int(self.values.shape[1])

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of shape and numbers, in hexadecimal."""
        shape = f"{self.values.shape}".encode()
        return hashlib.sha256(shape + self.values.astype("<f4").tobytes()).hexdigest()

    def of_heads(self, heads: slice | Sequence[int]) -> MeanKey:
        """That of some of the heads."""
        return MeanKey(self.values[heads if isinstance(heads, slice) else list(heads)])


MeanKeys = tuple[MeanKey | None, ...]
"""Of each layer that owns a cache; None where nothing is subtracted."""


def checked_mean_keys(mean_keys: Any, layers: int) -> MeanKeys | None:
    """The mean keys of a plan in one normal form.

    Args:
        mean_keys: None, or for each layer None, a `MeanKey`, or its numbers.
        layers: how many there are.

    Returns:
        None where no layer has one.

    Raises:
        BudgetError: another number of layers, or something that is no mean key; the message names the layer.
    """
    if mean_keys is None:
        return None
    if not isinstance(mean_keys, Sequence) or isinstance(mean_keys, str | bytes | bytearray):
        raise BudgetError(f"mean_keys must be a sequence, one entry for each capacity; got {type(mean_keys).__name__}")
    if len(mean_keys) != layers:
        raise BudgetError(f"mean_keys has {len(mean_keys)} entries for {layers} capacities; give one for each of them")
    checked = tuple(_checked(mean, layer) for layer, mean in enumerate(mean_keys))
    return checked if any(mean is not None for mean in checked) else None


def _checked(mean: Any, layer: int) -> MeanKey | None:
    if mean is None or isinstance(mean, MeanKey):
        return mean
    try:
        return MeanKey(mean)
    except BudgetError as error:
        raise BudgetError(f"layer {layer}: {error}") from error


def check_fits(mean: MeanKey, layer: int, kv_heads: int, key_dim: int) -> None:
    """Refuse a mean key that is not of a layer with such keys, or of a model of which it is a part.

    Raises:
        BudgetError: it is not.
    """
    if mean.key_dim != key_dim or mean.kv_heads % kv_heads:
        raise BudgetError(
            f"the mean key of layer {layer} is of {mean.kv_heads} KV heads of {mean.key_dim} elements, but the layer "
            f"caches {kv_heads} of {key_dim}; a plan's constants are those of the model that was calibrated"
        )


def of_part(mean: MeanKey, layer: int, kv_heads: int, part: int, parts: int) -> MeanKey:
    """That of the KV heads which one of several processes has.

    Args:
        kv_heads: how many these are; all of them where the processes do not share out the layer's keys.
        part, parts: which process it is, of how many.

    Raises:
        BudgetError: the mean key is of another number of heads.
    """
    if mean.kv_heads == kv_heads:
        return mean
    if mean.kv_heads != kv_heads * parts:
        whole = "" if parts == 1 else f" in each of {parts} processes"
        raise BudgetError(
            f"the mean key of layer {layer} is of {mean.kv_heads} KV heads, but the layer has {kv_heads}{whole}"
        )
    return mean.of_heads(slice(part * kv_heads, (part + 1) * kv_heads))


# Their file


def constants_bytes(mean_keys: MeanKeys) -> bytes:
    """The content of their safetensors file."""
    import safetensors.numpy

    return safetensors.numpy.save(arrays_of(mean_keys))


def arrays_of(mean_keys: MeanKeys) -> dict[str, NDArray[np.float32]]:
    """Float32 `[kv_heads, key_dim]` by name, of the layers that have one."""
    return {_NAME.format(layer): mean.values for layer, mean in enumerate(mean_keys) if mean is not None}


def mean_keys_of(arrays: Mapping[str, NDArray[np.float32]], layers: int) -> MeanKeys | None:
    """From what `arrays_of` gave.

    Raises:
        FileFormatError: an array that is not named for a layer.
        BudgetError: one that is no mean key.
    """
    names = [_NAME.format(layer) for layer in range(layers)]
    strange = sorted(set(arrays) - set(names))
    if strange:
        raise FileFormatError(f"it holds {strange[0]!r:.100}, which is no mean key of {layers} layers")
    return checked_mean_keys([arrays.get(name) for name in names], layers)


def write_constants(path: str | os.PathLike[str], mean_keys: MeanKeys) -> None:
    """Write them; the file appears whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_bytes(constants_bytes(mean_keys))


def reference_to(name: str, mean_keys: MeanKeys) -> dict[str, str]:
    """What a plan's JSON says of its constants: the name of their file beside it, and the file's SHA-256."""
    return {"file": name, "sha256": hashlib.sha256(constants_bytes(mean_keys)).hexdigest()}


def read_constants(reference: Any, folder: str | os.PathLike[str], layers: int) -> MeanKeys | None:
    """The mean keys that a plan's JSON refers to.

    Args:
        reference: as `reference_to` made it, read as untrusted.
        folder: where the JSON lies.
        layers: how many the plan has.

    Raises:
        FileFormatError: the reference or the file is not what it should be; the message names the file.
    """
    given = check_fields(reference, {"file": TEXT, "sha256": TEXT}, "constants")
    name = given["file"]
    if re.fullmatch(r"[^/\\:\0]{1,255}", name) is None or not name.endswith(_SUFFIX):
        raise FileFormatError(f"the constants must be a {_SUFFIX} file in the plan's own folder, not {name!r:.300}")
    path = Path(folder) / name
    if not path.is_file():
        raise FileFormatError(
            f"{path}: the plan's constants are missing; keep this file beside the plan, or solve again"
        )
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_CONSTANTS_BYTES + 1)
        if len(raw) > MAX_CONSTANTS_BYTES:
            raise FileFormatError(f"larger than {MAX_CONSTANTS_BYTES} bytes")
        if hashlib.sha256(raw).hexdigest() != given["sha256"]:
            raise FileFormatError("these are not the plan's constants: its SHA-256 is another; solve again")
        return mean_keys_of(_float32_arrays(raw), layers)
    except (FileFormatError, BudgetError) as error:
        raise FileFormatError(f"{path}: {error!s:.1000}") from error


def _float32_arrays(raw: bytes) -> dict[str, NDArray[np.float32]]:
    import numpy as np

    try:
        found = safetensors.deserialize(raw)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise FileFormatError(f"not a whole safetensors file ({error})") from error
    arrays = {}
    for name, tensor in found:
        if tensor["dtype"] != "F32":
            raise FileFormatError(f"{name!r:.100} is of {tensor['dtype']} instead of float32")
        arrays[name] = np.frombuffer(tensor["data"], dtype="<f4").reshape(tensor["shape"])
    return arrays
