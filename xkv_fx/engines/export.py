"""Writing an engine: the graphs of a transformed model, lowered ahead of time, its weights once, and a manifest."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.export import ExportedProgram

from xkv_fx.budgets import CONSTANTS
from xkv_fx.capture.export import UNBOUNDED
from xkv_fx.engines.forms import forms_of
from xkv_fx.engines.manifest import WEIGHTS, Manifest, inputs_of
from xkv_fx.engines.records import FileRecord, Machine, Package, spec_of
from xkv_fx.engines.targets import target_of
from xkv_fx.engines.trace import SHORTEST
from xkv_fx.errors import BackendError, EngineError, UnsupportedModelError
from xkv_fx.files import folder_written_whole
from xkv_fx.lowering.budgeted import Budgeted
from xkv_fx.mean_keys import write_constants
from xkv_fx.passes.analyses.known_tokens import known_tokens
from xkv_fx.runtime.state import GraphKind

TOKENIZER = "tokenizer"


def export_engine(llm: Budgeted, folder: str | os.PathLike[str], target: str, tokenizer: Any) -> None:
    """See `xkv_fx.export`."""
    if not isinstance(llm, Budgeted):
        raise UnsupportedModelError(f"a {type(llm).__name__} cannot be exported; give what xkv_fx.transform returned")
    devices, forms = target_of(target).devices, forms_of(target_of(target))
    graphs = llm.program.graphs
    plan = graphs.plan
    if graphs.captured.shard.size > 1:
        raise UnsupportedModelError(
            f"this model is split among {graphs.captured.shard.size} processes, and an engine runs in one; export what "
            "was made from the whole model"
        )
    if plan.recurrent and target == "tensorrt":
        raise UnsupportedModelError(
            f"this model has {len(plan.recurrent)} recurrent layers, whose states engines of the target 'tensorrt' do "
            "not carry along; the target 'aoti' does"
        )
    if any(spec.index_dim for spec in plan.specs):
        raise UnsupportedModelError(
            "this model has layers whose queries attend to what an indexer picks, which engines do not do; run it with "
            "the model's own code"
        )
    for form in forms.values():
        form.check_tools()
    if plan.device.type not in devices:
        raise BackendError(
            f"engines of the target {target!r} run on {' and '.join(devices)}; this model is on {plan.device.type}"
        )
    longest = graphs.captured.max_positions or UNBOUNDED
    if longest < SHORTEST:
        raise UnsupportedModelError(f"a model of {longest} positions cannot be exported")
    try:
        with folder_written_whole(folder) as part:
            weights = _Weights()
            programs: dict[GraphKind, ExportedProgram] = {}
            packages: dict[GraphKind, Package] = {}
            for kind, form in forms.items():
                programs[kind], taken = form.trace(graphs, kind, longest)
                packages[kind] = Package(f"{kind}{form.suffix}", weights.add(taken), inputs_of(kind, plan))
            manifest = Manifest(
                target=target,
                machine=Machine.here(plan.device.type),
                xkv_fx=_version(),
                model=graphs.captured.fingerprint,
                program=llm.program.key,
                budgets=llm.budgets,
                layers=plan.layers,
                recurrent=plan.recurrent,
                room=max(slots.slots - slots.capacity for slots in plan.slots),
                batch_size=plan.rows,
                dtype=str(plan.dtype).removeprefix("torch."),
                vocabulary=graphs.captured.vocabulary,
                known_tokens=known_tokens(graphs.decode, graphs.captured.vocabulary),
                max_positions=graphs.captured.max_positions,
                shortest=SHORTEST,
                longest=longest,
                end_tokens=llm.end_tokens,
                pad_token=llm.pad_token,
                weights=tuple(spec_of(name, tensor.shape, tensor.dtype) for name, tensor in weights.tensors.items()),
                packages=packages,
                files={},
            )
            if llm.budgets.mean_keys is not None:
                write_constants(part / CONSTANTS, llm.budgets.mean_keys)
            manifest.check_before_files(part)
            for kind, form in forms.items():
                key = manifest.package_key(kind)
                build = form.write(programs.pop(kind), part / packages[kind].file, key, plan)
                if build is not None:
                    manifest = dataclasses.replace(manifest, tensorrt=build)
            save_file(weights.separate(), part / WEIGHTS)
            shutil.copymode(part / packages["decode"].file, part / WEIGHTS)  # safetensors lets only the owner read it
            if tokenizer is not None:
                tokenizer.save_pretrained(part / TOKENIZER)
            manifest.with_files(_files_in(part)).save(part)
    except FileExistsError as error:
        raise EngineError(str(error)) from error


class _Weights:
    """The weights of all graphs, each tensor once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def add(self, taken: dict[str, Tensor]) -> tuple[str, ...]:
        """Their names in the file, in order."""
        return tuple(self._name(name, tensor) for name, tensor in taken.items())

    def separate(self) -> dict[str, Tensor]:
        """The tensors; those that are parts of a larger one are copied, since the file cannot hold them."""
        storages: set[int] = set()
        result = {}
        for name, tensor in self.tensors.items():
            start = tensor.untyped_storage().data_ptr()
            result[name] = tensor.clone() if start in storages else tensor
            storages.add(start)
        return result

    def _name(self, name: str, tensor: Tensor) -> str:
        what = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) if tensor.numel() else (name,)
        if what not in self._names:
            while name in self.tensors:  # another graph's, of the same name
                name += "_"
            self._names[what] = name
            self.tensors[name] = tensor
        return self._names[what]


def _version() -> str:
    try:
        return importlib.metadata.version("xkv-fx")
    except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
        return "unknown"


def _files_in(folder: Path) -> dict[str, FileRecord]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileRecord.of(path) for path in paths}
