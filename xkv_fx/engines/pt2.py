"""ExportedPrograms as files: portable, but torch reads them with pickle."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

KEY_FILE = "xkv_fx"
"""Under this name a program's file holds what it was traced for; see `manifest.package_key`."""


def save_program(program: ExportedProgram, path: Path, key: str) -> None:
    """Write `program` without the tensors that it was traced with.

    Args:
        key: stored in the file.
    """
    program.example_inputs = None  # the weights among them
    torch.export.save(program, path, extra_files={KEY_FILE: key})
