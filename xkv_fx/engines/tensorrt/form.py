"""Packages of the target "tensorrt": decode as an engine of TensorRT's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.export import ExportedProgram

from xkv_fx.engines.form import KEY_FILE, PackageForm, Run
from xkv_fx.engines.manifest import Manifest
from xkv_fx.engines.records import TensorRTBuild
from xkv_fx.engines.tensorrt.build import (
    ENGINE,
    caches_of,
    compile_tensorrt,
    import_torch_tensorrt,
    written_in_place,
)
from xkv_fx.engines.tensorrt.run import TensorRTDecode, check_library
from xkv_fx.errors import FileFormatError
from xkv_fx.runtime.state import CachePlan, GraphKind

if TYPE_CHECKING:
    from xkv_fx.lowering.program import Graphs


def _trace(graphs: Graphs, kind: GraphKind, longest: int) -> tuple[ExportedProgram, dict[str, Tensor]]:
    """The engine holds its weights itself."""
    from xkv_fx.engines.tensorrt.graph import trace_for_tensorrt  # which those who load an engine do without

    return trace_for_tensorrt(graphs.get(kind).module, graphs.plan), {}


def _write(program: ExportedProgram, path: Path, key: str, plan: CachePlan) -> TensorRTBuild:
    return compile_tensorrt(program, path, key, len(caches_of(plan)) if written_in_place(plan) else 0)


def _load(path: Path, manifest: Manifest) -> Run:
    return TensorRTDecode(path, manifest, _build_of(manifest))


def _build_of(manifest: Manifest) -> TensorRTBuild:
    if manifest.tensorrt is None:
        raise FileFormatError("the manifest does not say what TensorRT built")
    return manifest.tensorrt


FORM = PackageForm(
    suffix=".trt",
    trace=_trace,
    write=_write,
    load=_load,
    belongs=lambda member: member in (ENGINE, KEY_FILE),
    check_tools=import_torch_tensorrt,
    check_runtime=lambda manifest: check_library(_build_of(manifest)),
)
