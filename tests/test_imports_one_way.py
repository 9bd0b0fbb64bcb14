"""Imports point one way: cli -> evaluation -> the face -> api -> compile_backend -> the users' plan -> hf, engines ->
planning, lowering -> capture -> passes -> runtime -> the plan's files.

Every import counts, also one inside a function, under TYPE_CHECKING, or by the name of a module in a string.
"""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest
from import_graph import (
    FILES,
    LEVEL,
    MODULES,
    ROOT,
    folder_of,
    import_graph,
    imported_modules,
    imports_of,
    module_name,
    room_of,
)

MAY_IMPORT_TRANSFORMERS = {"hf", "compile_backend", "register_attention", "evaluation"}
WITHOUT_TORCH = {
    "errors", "files", "fields", "engine_settings", "file_kinds", "formats", "layers", "mean_keys", "policy", "budgets",
    "provenance", "public_budgets", "register_attention", "sizes",
}  # fmt: skip


def described(path: Path, found: list[tuple[int, str]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line} imports {module}" for line, module in found]


def files_in(rooms: set[str]) -> list[Path]:
    return [path for path in FILES if room_of(module_name(path)) in rooms]


def each_of(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=module_name)


@each_of(FILES)
def test_every_file_has_a_level(path: Path) -> None:
    assert room_of(module_name(path)) in LEVEL, "say on which level it stands, in tests/import_graph.py"


@each_of(FILES)
def test_imports_point_down(path: Path) -> None:
    own = room_of(module_name(path))
    up = [
        (line, module)
        for line, module in imports_of(path)
        if module in MODULES and room_of(module) != own and LEVEL[room_of(module)] >= LEVEL[own]
    ]
    assert not up, described(path, up)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert not list(nx.simple_cycles(import_graph()))


def test_no_folder_imports_itself_by_way_of_others() -> None:
    folders = nx.DiGraph()
    for source, target in import_graph().edges:
        if folder_of(source) != folder_of(target):
            folders.add_edge(folder_of(source), folder_of(target))
    for room in [folder for folder in folders if "." in folder]:  # a room and a folder in it belong together
        if folders.has_edge(room, room.rpartition(".")[0]) and folders.has_edge(room.rpartition(".")[0], room):
            folders.remove_edge(room.rpartition(".")[0], room)
    assert not list(nx.simple_cycles(folders))


@each_of(files_in(set(LEVEL) - MAY_IMPORT_TRANSFORMERS))
def test_only_rooms_above_the_core_import_transformers(path: Path) -> None:
    found = [(line, module) for line, module in imports_of(path) if module.split(".")[0] == "transformers"]
    assert not found, described(path, found)


@each_of(files_in(WITHOUT_TORCH))
def test_plans_need_no_torch(path: Path) -> None:
    """Nor numpy, but for the constants of plans that have any."""
    heavy = ("torch",) if module_name(path) == "xkv_fx.mean_keys" else ("torch", "numpy")
    found = [(line, module) for line, module in imports_of(path) if module.split(".")[0] in heavy]
    assert not found, described(path, found)


@each_of(FILES)
def test_imports_go_by_the_packages_name(path: Path) -> None:
    """The root links make `passes` and `runtime` importable from the root; two copies of one module must not arise."""
    found = [(line, module) for line, module in imports_of(path) if module.split(".")[0] in ("passes", "runtime")]
    assert not found, described(path, found)


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=module_name)
def test_every_folder_is_a_package(folder: Path) -> None:
    assert (folder / "__init__.py").is_file(), "a folder without it is left out of what is installed"


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import torch.fx", "torch.fx"),
        ("def f():\n    import transformers", "transformers"),
        ("if TYPE_CHECKING:\n    from transformers import Cache", "transformers"),
        ("from xkv_fx import budgets", "xkv_fx.budgets"),
        ("from xkv_fx import Budgets", "xkv_fx"),
        ("from . import slots", "xkv_fx.runtime.slots"),
        ("from .slots import SlotPlan", "xkv_fx.runtime.slots"),
        ("from .. import budgets", "xkv_fx.budgets"),
        ("from ..errors import XkvError", "xkv_fx.errors"),
        ("import_module('xkv_fx.api')", "xkv_fx.api"),
        ("importlib.import_module('transformers')", "transformers"),
        ("HOME = 'xkv_fx.hf.capture'", "xkv_fx.hf.capture"),
        ("HOMES = {'Budgets': 'xkv_fx.budgets'}", "xkv_fx.budgets"),
    ],
)
def test_every_form_of_import_is_seen(source: str, module: str) -> None:
    assert [name for _, name in imported_modules(source, package="xkv_fx.runtime")] == [module]
