"""ExportedPrograms as packages: portable, but torch reads them with pickle."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.export import ExportedProgram

from xkv_fx.engines.form import KEY_FILE, PackageForm, Run
from xkv_fx.engines.manifest import Manifest
from xkv_fx.errors import EngineError
from xkv_fx.runtime.state import CachePlan, GraphKind

if TYPE_CHECKING:
    from xkv_fx.lowering.program import Graphs


def _trace(graphs: Graphs, kind: GraphKind, longest: int) -> tuple[ExportedProgram, dict[str, Tensor]]:
    from xkv_fx.engines.trace import trace_program  # not needed to load an engine

    return trace_program(graphs.get(kind).module, graphs.scorer, longest)


def _write(program: ExportedProgram, path: Path, key: str, plan: CachePlan) -> None:
    """Write `program` without the tensors that it was traced with."""
    program.example_inputs = None  # the weights among them
    torch.export.save(program, path, extra_files={KEY_FILE: key})


def _load(path: Path, manifest: Manifest) -> Run:
    try:
        module = torch.export.load(path).module(check_guards=False)
    except (RuntimeError, zipfile.BadZipFile) as error:
        raise EngineError(f"{path}: torch could not load it ({error})") from error
    return lambda inputs: module(*inputs)


FORM = PackageForm(suffix=".pt2", trace=_trace, write=_write, load=_load, belongs=lambda member: True, pickled=True)
