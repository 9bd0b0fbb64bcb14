"""Imports point one way: evaluation, cli -> api -> hf, lowering, planning -> passes -> runtime -> budgets -> layers,
policy.

Every import counts, also one inside a function, under TYPE_CHECKING, or by `import_module("...")`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "xkv_fx"

# A room may import itself, those beside it on its level, and all below.
LEVELS = (
    ("errors",),
    ("files", "engine_settings", "register_attention"),
    ("layers", "policy"),
    ("budgets",),
    ("runtime",),
    ("passes",),
    ("hf", "lowering", "planning"),
    ("api",),
    ("",),  # the package's face
    ("evaluation", "cli", "__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MAY_IMPORT_TRANSFORMERS = {"hf", "evaluation"}
WITHOUT_TORCH = {"errors", "files", "engine_settings", "register_attention", "layers", "policy", "budgets"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_name(path) for path in FILES}


def room_of(module: str) -> str:
    """`xkv_fx.passes.graph` -> `passes`; the face is ``."""
    return [*module.split("."), ""][1]


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a file of `package` imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{origin}.{alias.name}"
                yield node.lineno, submodule if submodule in MODULES else origin
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def imports_of(path: Path) -> list[tuple[int, str]]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return list(imported_modules(path.read_text(encoding="utf-8"), package))


def described(path: Path, found: list[tuple[int, str]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line} imports {module}" for line, module in found]


def files_in(rooms: set[str]) -> list[Path]:
    return [path for path in FILES if room_of(module_name(path)) in rooms]


def each_of(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=module_name)


@each_of(FILES)
def test_every_file_has_a_level(path: Path) -> None:
    assert room_of(module_name(path)) in LEVEL, "say on which level of the design's order it stands, in LEVELS above"


@each_of([path for path in FILES if path != PACKAGE / "__init__.py"])  # the face names everybody's public names
def test_imports_point_down(path: Path) -> None:
    level = LEVEL.get(room_of(module_name(path)), -1)
    up = [
        (line, module)
        for line, module in imports_of(path)
        if module.split(".")[0] == "xkv_fx" and LEVEL.get(room_of(module), len(LEVELS)) > level
    ]
    assert not up, described(path, up)


@each_of(files_in(set(LEVEL) - MAY_IMPORT_TRANSFORMERS))
def test_only_hf_and_evaluation_import_transformers(path: Path) -> None:
    found = [(line, module) for line, module in imports_of(path) if module.split(".")[0] == "transformers"]
    assert not found, described(path, found)


@each_of(files_in(WITHOUT_TORCH))
def test_plans_need_no_torch(path: Path) -> None:
    found = [(line, module) for line, module in imports_of(path) if module.split(".")[0] in ("torch", "numpy")]
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
    ],
)
def test_every_form_of_import_is_seen(source: str, module: str) -> None:
    assert [name for _, name in imported_modules(source, package="xkv_fx.runtime")] == [module]
