"""What an engine's folder says about itself, read as untrusted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from xkv_fx.budgets import CONSTANTS, Plan
from xkv_fx.engines.records import (
    DTYPES,
    LENGTH,
    FileRecord,
    Machine,
    Package,
    TensorRTBuild,
    TensorSpec,
    read_states,
    spec_of,
    write_states,
)
from xkv_fx.engines.targets import TARGETS
from xkv_fx.errors import EngineError, FileFormatError, XkvError
from xkv_fx.fields import DOCUMENT, LIST, OBJECT, TEXT, Field, check_fields, list_of, or_null, whole
from xkv_fx.files import read_sealed_json, write_sealed_json
from xkv_fx.layers import LayerSpec, layer_fields, layer_specs
from xkv_fx.runtime.recurrence import StatePart
from xkv_fx.runtime.state import GRAPH_KINDS, CachePlan, GraphKind

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
        program: identifies model, plan and batch size; the same as the transformed model's, so that sessions fit.
        budgets: the plan.
        layers: what each layer caches.
        room: slots set aside for generated tokens under `eviction="append"`.
        batch_size: rows.
        dtype: of K/V.
        vocabulary: size of the logits' last dimension.
        known_tokens: token ids from 0 up to, but not including, this number may be fed.
        max_positions: longest sequence of a row; None if unbounded.
        shortest, longest: columns that the graphs of prompts take.
        end_tokens: generation of a row ends with one of these.
        pad_token: what fills up rows that have ended.
        weights: all weights, as in the file.
        packages: the graphs, by their kind.
        files: size and hash of every file of the folder but the manifest.
        tensorrt: what TensorRT made of decode, where that is the target.
        recurrent: what each layer keeps that mixes tokens by a state; left out of the file where there is none.
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
    packages: Mapping[GraphKind, Package]
    files: Mapping[str, FileRecord]
    tensorrt: TensorRTBuild | None = None
    recurrent: tuple[tuple[StatePart, ...], ...] = ()

    @property
    def plan(self) -> CachePlan:
        """What each session allocates.

        Raises:
            BudgetError: the budgets do not fit the layers.
        """
        device = torch.device(self.machine.device)
        dtype = DTYPES[self.dtype]
        return CachePlan.of(
            self.budgets, self.layers, self.batch_size, dtype, device, self.room, recurrent=self.recurrent
        )

    def package_key(self, kind: GraphKind) -> str:
        """SHA-256 of all that a package was compiled for; the package holds it too."""
        package = self.packages[kind]
        shapes = {spec.name: spec.to_dict() for spec in self.weights}
        compiled_for = {
            "kind": kind,
            "model": self.model,
            "capacities": self.budgets.capacities,
            "policy": self.budgets.policy.to_dict(),
            "layers": layer_fields(self.layers),
            "room": self.room,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "tokens": (self.vocabulary, self.known_tokens),
            "columns": (self.shortest, self.longest, self.max_positions),
            "weights": [shapes[name] for name in package.weights],
            "inputs": [spec.to_dict() for spec in package.inputs],
        }
        if self.recurrent:
            compiled_for["recurrent"] = write_states(self.recurrent)
        if self.budgets.formats is not None:
            compiled_for["formats"] = self.budgets.formats
        if self.budgets.mean_keys is not None:
            compiled_for["mean_keys"] = [mean and mean.digest for mean in self.budgets.mean_keys]
        return hashlib.sha256(json.dumps(compiled_for, sort_keys=True).encode()).hexdigest()

    def with_files(self, files: Mapping[str, FileRecord]) -> Manifest:
        """The same manifest, with these files."""
        return dataclasses.replace(self, files=files)

    @property
    def _needed(self) -> tuple[str, ...]:
        """The files that the engine cannot do without."""
        constants = () if self.budgets.mean_keys is None else (CONSTANTS,)
        return (WEIGHTS, *constants, *(package.file for package in self.packages.values()))

    def check_before_files(self, folder: Path) -> None:
        """Refuse what `load` would refuse in this manifest, before anything is compiled and any file is written but the
        plan's constants, which lie in the folder.

        Raises:
            EngineError: a field that a manifest may not have, or one that contradicts another.
        """
        written = self.with_files(dict.fromkeys(self._needed, FileRecord(0, "")))
        document = {"format": FORMAT, "version": FORMAT_VERSION, **written._to_dict()}
        try:
            read = Manifest._from_dict(document, folder, type(self.budgets))
            read._check_names()
            read._check_packages()
        except XkvError as error:
            raise EngineError(
                f"an engine of this model could not be loaded: {error!s:.1000} (end_tokens and pad_token are those of "
                "the generation_config)"
            ) from error

    def save(self, folder: Path) -> None:
        """Write it into the folder, whole or not at all."""
        write_sealed_json(folder / NAME, {"format": FORMAT, "version": FORMAT_VERSION, **self._to_dict()})

    def _to_dict(self) -> dict[str, Any]:
        stored = _stored()
        told = (field.name for field in dataclasses.fields(self) if field.name != "recurrent" or self.recurrent)
        return {name: stored[name].write(getattr(self, name)) for name in told}

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
            manifest = cls._from_dict(data, folder, plan_type)
            manifest._check()
        except XkvError as error:
            raise FileFormatError(f"{path}: {error!s:.1000}") from error
        return manifest

    @classmethod
    def _from_dict(cls, data: dict[str, Any], folder: Path, plan_type: type[Plan]) -> Manifest:
        stored = _stored(lambda plan: plan_type.from_dict(plan, folder))
        expected = {**DOCUMENT, **{name: each.field for name, each in stored.items()}}
        fields = check_fields(data, expected, optional=("recurrent",))
        return cls(**{name: each.read(fields[name]) for name, each in stored.items() if name in fields})

    def _check(self) -> None:
        """Check that names, files, shapes and the plan agree.

        Raises:
            FileFormatError: they do not.
            BudgetError: the budgets do not fit the layers.
        """
        self._check_names()
        if (self.target == "tensorrt") != (self.tensorrt is not None):
            raise FileFormatError("'tensorrt' says what TensorRT built, and belongs to that target only")
        self._check_packages()

    def _check_names(self) -> None:
        """Check that target, device and dtype are known, the columns make a range, and the files lie in the folder."""
        if self.target not in TARGETS:
            raise FileFormatError(f"its target {self.target!r} is unknown; known are {', '.join(TARGETS)}")
        if self.machine.device not in TARGETS[self.target].devices:
            devices = ", ".join(TARGETS[self.target].devices)
            raise FileFormatError(f"its device {self.machine.device!r} is unknown; known are {devices}")
        if self.dtype not in DTYPES:
            raise FileFormatError(f"its dtype {self.dtype!r} is unknown")
        if self.longest < self.shortest:
            raise FileFormatError(f"'longest' is {self.longest}, below 'shortest', which is {self.shortest}")
        for name in self._needed:
            if name not in self.files:
                raise FileFormatError(f"'files' does not name {name}")
        for name in self.files:
            check_name(name)

    def _check_packages(self) -> None:
        """Check that weights, inputs and the plan agree."""
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


@dataclasses.dataclass(frozen=True)
class _Stored:
    """How a field of the manifest is stored in the file.

    Attributes:
        field: what may stand there.
        write: turns the value into what stands there.
        read: turns what stands there back into the value.
    """

    field: Field
    write: Callable[[Any], Any] = lambda value: value
    read: Callable[[Any], Any] = lambda value: value


def _stored(read_plan: Callable[[Any], Plan] = Plan.from_dict) -> dict[str, _Stored]:
    """How each field of a manifest stands in the file; one that is not named here cannot be saved."""
    count, text = _Stored(whole(1)), _Stored(TEXT)
    return {
        "target": text,
        "machine": _Stored(OBJECT, dataclasses.asdict, Machine.from_dict),
        "xkv_fx": text,
        "model": text,
        "program": text,
        "budgets": _Stored(OBJECT, Plan.to_dict, read_plan),
        "layers": _Stored(LIST, layer_fields, layer_specs),
        "room": _Stored(whole()),  # the plan says what it may be
        "batch_size": count,
        "dtype": text,
        "vocabulary": count,
        "known_tokens": count,
        "max_positions": _Stored(or_null(whole(1))),
        "shortest": count,
        "longest": count,
        "end_tokens": _Stored(list_of(whole(0)), list, tuple),
        "pad_token": _Stored(whole(0)),
        "weights": _Stored(LIST, _write_weights, _read_weights),
        "packages": _Stored(OBJECT, _write_named, _read_packages),
        "files": _Stored(OBJECT, _write_named, _read_files),
        "tensorrt": _Stored(or_null(OBJECT), _write_build, _read_build),
        "recurrent": _Stored(LIST, write_states, read_states),
    }


def _write_weights(weights: Sequence[TensorSpec]) -> list[Any]:
    return [spec.to_dict() for spec in weights]


def _read_weights(data: list[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec.from_dict(spec) for spec in data)


def _write_named(records: Mapping[str, Package | FileRecord]) -> dict[str, Any]:
    return {name: record.to_dict() for name, record in records.items()}


def _read_packages(data: dict[str, Any]) -> dict[GraphKind, Package]:
    check_fields(data, dict.fromkeys(GRAPH_KINDS, OBJECT), "packages")
    return {kind: Package.from_dict(data[kind]) for kind in GRAPH_KINDS}


def _read_files(data: dict[str, Any]) -> dict[str, FileRecord]:
    return {name: FileRecord.from_dict(record) for name, record in data.items()}


def _write_build(build: TensorRTBuild | None) -> dict[str, Any] | None:
    return None if build is None else dataclasses.asdict(build)


def _read_build(data: dict[str, Any] | None) -> TensorRTBuild | None:
    return None if data is None else TensorRTBuild.from_dict(data)


def inputs_of(kind: GraphKind, plan: CachePlan) -> tuple[TensorSpec, ...]:
    """What a graph of that kind takes after its weights."""
    columns = 1 if kind == "decode" else LENGTH
    tokens = [TensorSpec(name, (plan.rows, columns), "int64") for name in ("input_ids", "position_ids")]
    if kind != "decode":
        tokens.append(TensorSpec("valid", (plan.rows, columns), "bool"))
    return (*tokens, *(spec_of(buffer.name, buffer.shape, buffer.dtype) for buffer in plan.buffers))


def check_name(name: str) -> None:
    """Refuse a file name in a manifest unless it lies below the folder and is written in the one normal form.

    Raises:
        FileFormatError: it does not.
    """
    parts = name.split("/")
    if len(name) > 255 or "\\" in name or "\0" in name or ":" in name or any(part in ("", ".", "..") for part in parts):
        raise FileFormatError(f"the file {name!r:.300} would lie outside of the folder, or is written in a strange way")
