"""What an engine's folder says about itself, read as untrusted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xkv_fx.budgets import Plan
from xkv_fx.engines.records import (
    DTYPES,
    LENGTH,
    FileRecord,
    Machine,
    Package,
    TensorRTBuild,
    TensorSpec,
    fields_of,
    spec_of,
)
from xkv_fx.engines.targets import TARGETS
from xkv_fx.errors import FileFormatError, XkvError
from xkv_fx.files import is_int, read_sealed_json, write_sealed_json
from xkv_fx.layers import LayerSpec, layer_specs
from xkv_fx.runtime.session import KINDS, Kind
from xkv_fx.runtime.slots import slot_plans
from xkv_fx.runtime.state import CachePlan

FORMAT = "xkv_fx.engine"
FORMAT_VERSION = 3  # 1 knew nothing of TensorRT, 2 had no checksum of its own
NAME = "manifest.json"
WEIGHTS = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """An engine, all but its code and weights.

    Attributes:
        target: one of `targets.TARGETS`.
        machine: what it was built for.
        xkv_fx: version of this package that wrote it.
        model: the model's fingerprint.
        program: identifies model, plan and batch size; as that of the transformed model, so that sessions fit.
        budgets: the plan.
        layers: what each layer caches.
        room: slots set aside for generated tokens under `eviction="append"`.
        batch_size: rows.
        dtype: of K/V.
        vocabulary: size of the logits' last dimension.
        known_tokens: ids from 0 to before this one may be fed.
        max_positions: longest sequence of a row; None if unbounded.
        shortest, longest: columns that the graphs of prompts take.
        end_tokens: generation of a row ends with one of these.
        pad_token: what fills rows that are over.
        weights: all weights, as in the file.
        packages: the graphs, by their kind.
        files: size and hash of every file of the folder but the manifest.
        tensorrt: what TensorRT made of decode, where that is the target.
    """

    target: str
    machine: Machine
    xkv_fx: str
    model: str
    program: str
    budgets: Plan
    layers: tuple[LayerSpec, ...]
    room: int
    batch_size: int
    dtype: str
    vocabulary: int
    known_tokens: int
    max_positions: int | None
    shortest: int
    longest: int
    end_tokens: tuple[int, ...]
    pad_token: int
    weights: tuple[TensorSpec, ...]
    packages: Mapping[Kind, Package]
    files: Mapping[str, FileRecord]
    tensorrt: TensorRTBuild | None = None

    @property
    def plan(self) -> CachePlan:
        """What each session allocates.

        Raises:
            BudgetError: the budgets do not fit the layers.
        """
        slots = slot_plans(self.budgets, self.layers, self.room)
        return CachePlan(self.layers, slots, self.batch_size, DTYPES[self.dtype], torch.device(self.machine.device))

    def package_key(self, kind: Kind) -> str:
        """SHA-256 of all that a package was compiled for; the package holds it too."""
        package = self.packages[kind]
        shapes = {spec.name: spec.to_dict() for spec in self.weights}
        compiled_for = {
            "kind": kind,
            "model": self.model,
            "capacities": self.budgets.capacities,
            "policy": self.budgets.policy.to_dict(),
            "layers": [dataclasses.asdict(spec) for spec in self.layers],
            "room": self.room,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "tokens": (self.vocabulary, self.known_tokens),
            "columns": (self.shortest, self.longest, self.max_positions),
            "weights": [shapes[name] for name in package.weights],
            "inputs": [spec.to_dict() for spec in package.inputs],
        }
        return hashlib.sha256(json.dumps(compiled_for, sort_keys=True).encode()).hexdigest()

    def with_files(self, files: Mapping[str, FileRecord]) -> Manifest:
        """The same, naming these files."""
        return dataclasses.replace(self, files=files)

    def save(self, folder: Path) -> None:
        """Write it into the folder, whole or not at all."""
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.type in ("str", "int", "int | None")
        }
        write_sealed_json(
            folder / NAME,
            {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                **plain,
                "machine": dataclasses.asdict(self.machine),
                "budgets": self.budgets.to_dict(),
                "layers": [dataclasses.asdict(spec) for spec in self.layers],
                "end_tokens": list(self.end_tokens),
                "packages": {kind: package.to_dict() for kind, package in self.packages.items()},
                "weights": [spec.to_dict() for spec in self.weights],
                "files": {name: record.to_dict() for name, record in self.files.items()},
                "tensorrt": None if self.tensorrt is None else dataclasses.asdict(self.tensorrt),
            },
        )

    @classmethod
    def load(cls, folder: Path, plan_type: type[Plan] = Plan) -> Manifest:
        """Read the manifest of a folder and check that it is one, and agrees with itself.

        Args:
            plan_type: the class that its plan will be of.

        Raises:
            FileFormatError: no manifest, damaged or changed, of another format, or one that contradicts itself.
        """
        path = folder / NAME
        if not path.is_file():
            raise FileFormatError(f"{path}: there is no such file; {folder} is not an engine's folder")
        data = read_sealed_json(path, FORMAT, FORMAT_VERSION, oldest=3)
        try:
            manifest = cls._from_dict(data, plan_type)
            manifest._check()
        except XkvError as error:
            raise FileFormatError(f"{path}: {error!s:.1000}") from error
        return manifest

    @classmethod
    def _from_dict(cls, data: dict[str, Any], plan_type: type[Plan]) -> Manifest:
        kinds: dict[str, Any] = {
            "str": str, "int": int, "int | None": (int, type(None)), "TensorRTBuild | None": (dict, type(None)),
        }  # fmt: skip
        names = {field.name: kinds.get(str(field.type), (dict, list)) for field in dataclasses.fields(cls)}
        fields = fields_of({name: data[name] for name in data if name not in ("format", "version")}, "it", names)
        for name in ("machine", "budgets", "packages", "files"):
            fields_of(fields[name], name)
        for name in ("layers", "end_tokens", "weights"):
            if not isinstance(fields[name], list):
                raise FileFormatError(f"{name!r} must be a list")
        if not all(is_int(token) and token >= 0 for token in fields["end_tokens"]):
            raise FileFormatError("'end_tokens' must be token ids")
        if set(fields["packages"]) != set(KINDS):
            raise FileFormatError(f"'packages' must be {', '.join(KINDS)}")
        fields["machine"] = Machine.from_dict(fields["machine"])
        fields["budgets"] = plan_type.from_dict(fields["budgets"])
        fields["layers"] = layer_specs(fields["layers"])
        fields["end_tokens"] = tuple(fields["end_tokens"])
        fields["weights"] = tuple(TensorSpec.from_dict(spec) for spec in fields["weights"])
        fields["packages"] = {kind: Package.from_dict(fields["packages"][kind]) for kind in KINDS}
        fields["files"] = {name: FileRecord.from_dict(record) for name, record in fields["files"].items()}
        if fields["tensorrt"] is not None:
            fields["tensorrt"] = TensorRTBuild.from_dict(fields["tensorrt"])
        return cls(**fields)

    def _check(self) -> None:
        """That names, files, shapes and the plan agree.

        Raises:
            FileFormatError: they do not.
            BudgetError: the budgets do not fit the layers.
        """
        if self.target not in TARGETS:
            raise FileFormatError(f"its target {self.target!r} is unknown; known are {', '.join(TARGETS)}")
        if (self.target == "tensorrt") != (self.tensorrt is not None):
            raise FileFormatError("'tensorrt' says what TensorRT built, and stands with that target alone")
        if self.machine.device not in TARGETS[self.target].devices:
            devices = ", ".join(TARGETS[self.target].devices)
            raise FileFormatError(f"its device {self.machine.device!r} is unknown; known are {devices}")
        if self.dtype not in DTYPES:
            raise FileFormatError(f"its dtype {self.dtype!r} is unknown")
        for name in ("batch_size", "vocabulary", "known_tokens", "shortest"):
            if getattr(self, name) < 1:
                raise FileFormatError(f"{name!r} must be at least 1; it is {getattr(self, name)}")
        if self.longest < self.shortest or self.pad_token < 0:
            raise FileFormatError("'longest' is below 'shortest', or 'pad_token' below 0")
        for name in (WEIGHTS, *(package.file for package in self.packages.values())):
            if name not in self.files:
                raise FileFormatError(f"'files' does not name {name}")
        for name in self.files:
            check_name(name)
        known = {spec.name for spec in self.weights}
        if len(known) != len(self.weights):
            raise FileFormatError("a weight is named twice")
        plan = self.plan
        for kind, package in self.packages.items():
            unknown = sorted(set(package.weights) - known)
            if unknown:
                raise FileFormatError(f"the package {kind} takes {unknown[0]!r}, which is no weight")
            expected = inputs_of(kind, plan)
            for planned, found in zip(expected, package.inputs, strict=False):
                if planned != found:
                    raise FileFormatError(
                        f"the budgets do not match the package {kind}: by them it takes {planned.name} {planned.dtype} "
                        f"{list(planned.shape)}, but it takes {found.name} {found.dtype} {list(found.shape)}"
                    )
            if len(expected) != len(package.inputs):
                raise FileFormatError(
                    f"the budgets do not match the package {kind}: by them it takes {len(expected)} inputs besides "
                    f"weights, but it takes {len(package.inputs)}"
                )


def inputs_of(kind: Kind, plan: CachePlan) -> tuple[TensorSpec, ...]:
    """What a graph of that kind takes after its weights."""
    columns = 1 if kind == "decode" else LENGTH
    tokens = [TensorSpec(name, (plan.rows, columns), "int64") for name in ("input_ids", "position_ids")]
    if kind != "decode":
        tokens.append(TensorSpec("valid", (plan.rows, columns), "bool"))
    return (*tokens, *(spec_of(buffer.name, buffer.shape, buffer.dtype) for buffer in plan.buffers))


def check_name(name: str) -> None:
    """Refuse a file name of a manifest that does not lie below the folder, in the one way of writing it.

    Raises:
        FileFormatError: it does not.
    """
    parts = name.split("/")
    if len(name) > 255 or "\\" in name or "\0" in name or ":" in name or any(part in ("", ".", "..") for part in parts):
        raise FileFormatError(f"the file {name!r:.300} would lie outside of the folder, or is written in a strange way")
