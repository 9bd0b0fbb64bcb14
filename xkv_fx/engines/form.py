"""What a package of an engine, the file of one graph, can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.export import ExportedProgram

from xkv_fx.engines.manifest import Manifest
from xkv_fx.engines.records import TensorRTBuild
from xkv_fx.runtime.state import CachePlan, GraphKind

if TYPE_CHECKING:  # an engine is loaded without the passes
    from xkv_fx.lowering.program import Graphs

Run = Callable[[list[Tensor]], Tensor]
"""Takes the weights and inputs of a package, and returns the logits."""
KEY_FILE = "xkv_fx"
"""The member of a package that holds what it was made for; see `Manifest.package_key`."""


def _nothing(*_: object) -> None:
    pass


def _is_key_file(member: str) -> bool:
    return member.rpartition("/")[2] == KEY_FILE


def _whole(content: str) -> str:
    return content


@dataclasses.dataclass(frozen=True)
class PackageForm:
    """How packages of one form are made, checked and loaded. Members of a package are named without its first folder.

    Attributes:
        suffix: of the file.
        trace: from `(graphs, kind, longest)`, where `longest` is the most columns of a prompt, to a program and, by
            name, the weights that it takes before its inputs. Raises BackendError or UnsupportedModelError.
        write: `(program, path, key, plan)` compiles the program and writes the package, which holds the key; returns
            what TensorRT made of it, if TensorRT was used. Raises BackendError or EngineError.
        load: `(path, manifest)` to what runs the package. Raises EngineError.
        belongs: whether a member may be in a package.
        holds_key: whether a member holds the key.
        key_in: the key in the content of such a member; None if it has none. Raises ValueError.
        check_tools: raises EngineError unless what packages are made with is installed.
        check_runtime: `(manifest)` raises EngineError unless what runs them is installed.
        pickled: whether torch reads them with pickle, which may run any code.
    """

    suffix: str
    trace: Callable[[Graphs, GraphKind, int], tuple[ExportedProgram, dict[str, Tensor]]]
    write: Callable[[ExportedProgram, Path, str, CachePlan], TensorRTBuild | None]
    load: Callable[[Path, Manifest], Run]
    belongs: Callable[[str], bool]
    holds_key: Callable[[str], bool] = _is_key_file
    key_in: Callable[[str], str | None] = _whole
    check_tools: Callable[[], object] = _nothing
    check_runtime: Callable[[Manifest], object] = _nothing
    pickled: bool = False
