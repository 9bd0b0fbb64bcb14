"""AOTInductor: a graph becomes a package of machine code that torch runs without Python code of ours."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.export import ExportedProgram

from xkv_fx.engines.form import PackageForm, Run
from xkv_fx.engines.manifest import Manifest
from xkv_fx.errors import BackendError, EngineError, first_line
from xkv_fx.runtime.state import CachePlan, GraphKind

if TYPE_CHECKING:
    from xkv_fx.lowering.program import Graphs

_METADATA_KEY = "xkv_fx"
"""Under this name a package's metadata hold what it was compiled for; see `Manifest.package_key`."""
# What torch writes around the code of a package.
_ABOUT = {"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"}
_CODE = "data/aotinductor/model/"


def _trace(graphs: Graphs, kind: GraphKind, longest: int) -> tuple[ExportedProgram, dict[str, Tensor]]:
    from xkv_fx.engines import by_sums  # not needed to load an engine
    from xkv_fx.engines.trace import trace_program

    instead = by_sums.BY_SUMS if kind == "decode" else {}
    return trace_program(graphs.get(kind).module, graphs.scorer, longest, instead)


def _compile(program: ExportedProgram, path: Path, key: str, plan: CachePlan) -> None:
    """Compile `program` for this machine's device and write the package to `path`, which ends in `.pt2`."""
    from xkv_fx.runtime.kernels.build_cpu import VECTORS_AS_TORCH  # not needed to load an engine

    wanted = {
        "aot_inductor.metadata": {_METADATA_KEY: key},
        "aot_inductor.enable_line_tables": False,
        "cpp.dynamic_threads": True,  # as many as the process has that runs it; else partial sums are laid out for ours
        **VECTORS_AS_TORCH,
        "cpp.march": "",  # only instructions of the set named in the manifest
    }
    known = torch._inductor.config.get_config_copy()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={name: value for name, value in wanted.items() if name in known},
            )
    except Exception as error:  # Inductor and the compilers that it calls raise errors of many kinds
        raise BackendError(
            f"AOTInductor could not compile {path.stem} ({first_line(error)}); it needs a C++ compiler on CPU and "
            "Triton on CUDA. target='pt2' needs none"
        ) from error


def _load(path: Path, manifest: Manifest) -> Run:
    try:
        loaded = torch._inductor.aoti_load_package(os.fspath(path))
    except RuntimeError as error:
        raise EngineError(f"{path}: torch could not load it ({error})") from error

    def run(inputs: list[Tensor]) -> Tensor:
        logits: Tensor = loaded.loader.run(inputs)[0]  # calling `loaded` itself would sort hundreds of inputs each time
        return logits

    return run


def _belongs(member: str) -> bool:
    return member in _ABOUT or member.startswith(_CODE)


def _holds_key(member: str) -> bool:
    return member.startswith(_CODE) and member.endswith("_metadata.json")


def _key_in(content: str) -> str | None:
    data = json.loads(content)
    key = data.get(_METADATA_KEY) if isinstance(data, dict) else None
    return key if isinstance(key, str) else None


FORM = PackageForm(
    suffix=".pt2",
    trace=_trace,
    write=_compile,
    load=_load,
    belongs=_belongs,
    holds_key=_holds_key,
    key_in=_key_in,
)
