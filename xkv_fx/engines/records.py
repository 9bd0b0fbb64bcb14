"""What a manifest is made of: tensors, packages, files, TensorRT's build and the machine, each read as untrusted."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xkv_fx.errors import EngineError, FileFormatError
from xkv_fx.files import is_int

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
        fields = fields_of(data, "a tensor", {"name": str, "shape": list, "dtype": str})
        for size in fields["shape"]:
            if size != LENGTH and not (is_int(size) and size >= 0):
                raise FileFormatError(f"the shape of {fields['name']!r} holds {size!r}")
        if fields["dtype"] not in DTYPES:
            raise FileFormatError(f"{fields['name']!r} is of an unknown dtype {fields['dtype']!r}")
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
        fields = fields_of(data, "a package", {"file": str, "weights": list, "inputs": list})
        if not all(isinstance(name, str) for name in fields["weights"]):
            raise FileFormatError("a package's weights must be names")
        return cls(
            fields["file"], tuple(fields["weights"]), tuple(TensorSpec.from_dict(spec) for spec in fields["inputs"])
        )


@dataclasses.dataclass(frozen=True)
class TensorRTBuild:
    """What TensorRT made of the decode graph, counted in the network that it was built from.

    Attributes:
        library, version: `"tensorrt"` or `"tensorrt_rtx"`, which alone can load the engine, and in this version.
        torch_tensorrt: version of what converted the graph.
        layers: of the network.
        caches_in_place: tensors of K/V that it updates in place, all of them.
        native_attentions: attentions that are TensorRT's own layer; others are written out.
        left_to_torch: ops that are no part of the engine, none.
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
        kinds = {field.name: int if field.type == "int" else str for field in dataclasses.fields(cls)}
        build = cls(**fields_of(data, "tensorrt", kinds))
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
        fields = fields_of(data, "a file", {"bytes": int, "sha256": str})
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
        return cls(**fields_of(data, "machine", {field.name: str for field in dataclasses.fields(cls)}))

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


def fields_of(data: Any, what: str, names: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object with exactly these fields of these types.

    Raises:
        FileFormatError: anything else.
    """
    if not isinstance(data, dict):
        raise FileFormatError(f"{what} must be a JSON object, not {type(data).__name__}")
    if names is None:
        return data
    wrong = sorted(set(names) ^ set(data))
    if wrong:
        state = "lacks" if wrong[0] in names else "has an unknown field"
        raise FileFormatError(f"{what} {state} {wrong[0]!r}; is the folder of another xkv_fx?")
    for name, kind in names.items():
        if not isinstance(data[name], kind) or isinstance(data[name], bool):
            raise FileFormatError(f"{name!r} of {what} is of the wrong type: {data[name]!r:.80}")
    return dict(data)
