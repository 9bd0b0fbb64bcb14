"""What a manifest is made of: tensors, packages, files, TensorRT's build and the machine, each read as untrusted."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xkv_fx.errors import EngineError, FileFormatError
from xkv_fx.fields import LIST, TEXT, Field, check_fields, list_of, one_of, whole
from xkv_fx.files import is_int
from xkv_fx.runtime.recurrence import StatePart

LENGTH = "S"
"""Stands in a shape for the number of columns of a prompt."""
LIBRARIES = ("tensorrt", "tensorrt_rtx")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64,
    )
}  # fmt: skip
_SIZE = Field(
    f"a whole number of at least 0 or {LENGTH!r}",
    lambda size: is_int(size) or size == LENGTH,
    lambda size: size == LENGTH or size >= 0,
)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A weight or an input: its name, its shape (`LENGTH` for the columns of a prompt), its dtype."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_dict(cls, data: Any) -> TensorSpec:
        fields = check_fields(data, {"name": TEXT, "shape": list_of(_SIZE), "dtype": one_of(DTYPES)}, "a tensor")
        return cls(fields["name"], tuple(fields["shape"]), fields["dtype"])


@dataclasses.dataclass(frozen=True)
class Package:
    """One graph: its file, and what it is called with: these weights, then these inputs."""

    file: str
    weights: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]

    def to_dict(self) -> dict[str, Any]:
        inputs = [spec.to_dict() for spec in self.inputs]
        return {"file": self.file, "weights": list(self.weights), "inputs": inputs}

    @classmethod
    def from_dict(cls, data: Any) -> Package:
        fields = check_fields(data, {"file": TEXT, "weights": list_of(TEXT), "inputs": LIST}, "a package")
        return cls(
            fields["file"], tuple(fields["weights"]), tuple(TensorSpec.from_dict(spec) for spec in fields["inputs"])
        )


@dataclasses.dataclass(frozen=True)
class TensorRTBuild:
    """What TensorRT made of the decode graph, counted in the network that it was built from.

    Attributes:
        library, version: `"tensorrt"` or `"tensorrt_rtx"`, the only library and version that can load the engine.
        torch_tensorrt: version of what converted the graph.
        layers: of the network.
        caches_in_place: tensors of K/V that it updates in place, all of them.
        native_attentions: attentions that are TensorRT's own layer; others are written out.
        left_to_torch: ops that are not part of the engine; there are none.
    """

    library: str
    version: str
    torch_tensorrt: str
    layers: int
    caches_in_place: int
    native_attentions: int
    left_to_torch: int = 0

    @classmethod
    def from_dict(cls, data: Any) -> TensorRTBuild:
        expected = {
            "library": TEXT, "version": TEXT, "torch_tensorrt": TEXT, "layers": whole(0), "caches_in_place": whole(0),
            "native_attentions": whole(0), "left_to_torch": whole(0),
        }  # fmt: skip
        build = cls(**check_fields(data, expected, "tensorrt"))
        if build.library not in LIBRARIES:  # it will be imported
            raise FileFormatError(f"its library {build.library!r} is unknown; known are {', '.join(LIBRARIES)}")
        return build


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of a file."""

    size: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self.sha256}

    @classmethod
    def from_dict(cls, data: Any) -> FileRecord:
        fields = check_fields(data, {"bytes": whole(0), "sha256": TEXT}, "a file")
        return cls(fields["bytes"], fields["sha256"])

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        with open(path, "rb") as file:
            return cls(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclasses.dataclass(frozen=True)
class Machine:
    """What compiled code needs: this torch, this kind of device, and these instructions."""

    torch: str
    device: str
    architecture: str
    instructions: str

    @classmethod
    def here(cls, device: str) -> Machine:
        """This machine; `instructions` is the CPU's capability, or for CUDA the GPU's compute capability."""
        if device == "cuda":
            major, minor = torch.cuda.get_device_capability()
            instructions = f"sm_{major}{minor}"
        else:
            instructions = torch.backends.cpu.get_cpu_capability()
        return cls(torch.__version__.split("+")[0], device, platform.machine(), instructions)

    @classmethod
    def from_dict(cls, data: Any) -> Machine:
        expected = dict.fromkeys(("torch", "device", "architecture", "instructions"), TEXT)
        return cls(**check_fields(data, expected, "machine"))

    def check(self) -> None:
        """Raise EngineError, saying what differs, unless this is the machine that runs now."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise EngineError("it was built for a GPU, and there is none here")
        here = Machine.here(self.device)
        for what, built, now in (
            ("torch", self.torch, here.torch),
            ("the processor", self.architecture, here.architecture),
            ("the instruction set", self.instructions, here.instructions),
        ):
            if built != now:
                raise EngineError(f"it was built for {what} {built}, and this is {now}; export it again for this one")


def spec_of(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(name, tuple(shape), str(dtype).removeprefix("torch."))


def write_states(recurrent: Sequence[Sequence[StatePart]]) -> list[Any]:
    """What layers keep that mix tokens by a state, as a file holds it."""
    return [[spec_of(part.field, part.shape, part.dtype).to_dict() for part in parts] for parts in recurrent]


def read_states(data: list[Any]) -> tuple[tuple[StatePart, ...], ...]:
    """As `write_states` wrote it.

    Raises:
        FileFormatError: it did not.
    """
    if not all(isinstance(parts, list) and parts for parts in data):
        raise FileFormatError("'recurrent' has a layer without states")
    return tuple(tuple(_state_part(TensorSpec.from_dict(part)) for part in parts) for parts in data)


def _state_part(spec: TensorSpec) -> StatePart:
    sizes = tuple(size for size in spec.shape if isinstance(size, int) and size > 0)
    if len(sizes) != len(spec.shape) or not re.fullmatch(r"[a-z]+\d{0,3}", spec.name):
        raise FileFormatError(f"'recurrent' has a state {spec.name!r:.100} of the shape {list(spec.shape)}")
    return StatePart(spec.name, sizes, DTYPES[spec.dtype])
