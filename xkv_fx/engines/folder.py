"""What is checked about the files of an engine's folder before anything in them runs."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xkv_fx.engines.form import PackageForm
from xkv_fx.engines.forms import forms_of
from xkv_fx.engines.manifest import Manifest
from xkv_fx.engines.records import FileRecord
from xkv_fx.engines.targets import TARGETS
from xkv_fx.errors import EngineError, FileFormatError, XkvError
from xkv_fx.runtime.state import GraphKind

_MAX_SMALL_BYTES = 1 << 20


def inspect_engine(folder: Path) -> dict[str, Any]:
    """What an engine's folder holds, and what is wrong with it; nothing in it runs.

    Returns:
        of JSON's types; under `checks`, for the machine, the files and the packages, `"ok"` or why they are refused.

    Raises:
        FileFormatError: there is no manifest that could be read.
    """
    manifest = Manifest.load(folder)
    plan = manifest.plan
    return {
        "engine": str(folder),
        "target": manifest.target,
        "model": manifest.model,
        "built_for": dataclasses.asdict(manifest.machine),
        "built_by": manifest.xkv_fx,
        "batch_size": manifest.batch_size,
        "dtype": manifest.dtype,
        "vocabulary": manifest.vocabulary,
        "max_positions": manifest.max_positions,
        "end_tokens": list(manifest.end_tokens),
        "kv_bytes": plan.kv_bytes,
        "state_bytes": plan.state_bytes,
        "other_state_bytes": plan.other_state_bytes,
        "file_bytes": sum(record.size for record in manifest.files.values()),
        "capacities": list(manifest.budgets.capacities),
        "slots": list(manifest.budgets.slots(manifest.layers, manifest.room)),
        "mean_keys": sum(mean is not None for mean in plan.mean_keys or ()),
        "policy": manifest.budgets.policy.to_dict(),
        "tensorrt": None if manifest.tensorrt is None else dataclasses.asdict(manifest.tensorrt),
        "checks": {
            "machine": _outcome(manifest.machine.check),
            "files": _outcome(lambda: check_files(folder, manifest)),
            "packages": _outcome(lambda: check_packages(folder, manifest)),
        },
    }


def _outcome(check: Callable[[], object]) -> str:
    try:
        check()
    except (XkvError, OSError) as error:
        return str(error)
    return "ok"


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check size and SHA-256 of every file that the manifest names.

    Raises:
        FileFormatError: one is missing, changed, or not a file within the folder.
    """
    root = folder.resolve()
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise FileFormatError(f"{path}: the manifest names it, but there is no such file")
        if path.resolve() != root / name:
            raise FileFormatError(f"{path}: a link; an engine's files lie in its own folder")
        size = os.stat(path).st_size
        if size != record.size:
            raise FileFormatError(f"{path}: {size} bytes instead of the manifest's {record.size}; it is damaged")
        if FileRecord.of(path) != record:
            raise FileFormatError(f"{path}: its SHA-256 is not the manifest's; it is damaged or was changed")


def check_packages(folder: Path, manifest: Manifest) -> None:
    """Check that each package holds what its target says, nothing else that torch would read, and is for this plan.

    Raises:
        FileFormatError: it does not.
        EngineError: it was made for another plan than the manifest's.
    """
    for kind, form in forms_of(TARGETS[manifest.target]).items():
        _check_package(folder, manifest, kind, form)


def _check_package(folder: Path, manifest: Manifest, kind: GraphKind, form: PackageForm) -> None:
    path = folder / manifest.packages[kind].file
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2]: name for name in archive.namelist()}
            foreign = [name for name in members if not form.belongs(name)]
            if foreign:
                raise FileFormatError(f"it holds {foreign[0]!r}, which is no part of compiled code")
            keys = {_read(archive, members[name]) for name in members if form.holds_key(name)}
        found = {form.key_in(content) for content in keys} - {None}
    except (FileFormatError, zipfile.BadZipFile, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: {error}") from error
    if found != {manifest.package_key(kind)}:
        raise EngineError(f"{path}: it was made for other budgets, weights or shapes than those of the manifest")


def _read(archive: zipfile.ZipFile, member: str) -> str:
    if archive.getinfo(member).file_size > _MAX_SMALL_BYTES:
        raise FileFormatError(f"{member} is larger than {_MAX_SMALL_BYTES} bytes")
    return archive.read(member).decode("utf-8", errors="replace")
