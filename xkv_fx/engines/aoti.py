"""AOTInductor: a graph becomes a package of machine code that torch runs without Python code of ours."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch.export import ExportedProgram

from xkv_fx.errors import BackendError, first_line

METADATA_KEY = "xkv_fx"
"""Under this name a package holds what it was compiled for; see `manifest.package_key`."""


def compile_aoti(program: ExportedProgram, path: Path, key: str) -> None:
    """Compile `program` for this machine's device and write the package to `path`, which ends in `.pt2`.

    Args:
        key: stored in the package.

    Raises:
        BackendError: the compiler is missing or fails.
    """
    wanted = {
        "aot_inductor.metadata": {METADATA_KEY: key},
        "aot_inductor.enable_line_tables": False,
        "cpp.dynamic_threads": True,  # as many as the process has that runs it; else partial sums are laid out for ours
        "cpp.march": "",  # nothing that the instruction set named in the manifest does not have
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
    except Exception as error:
        raise BackendError(
            f"AOTInductor could not compile {path.stem} ({first_line(error)}); it needs a C++ compiler on CPU and "
            "Triton on CUDA. target='pt2' needs none"
        ) from error
