"""Who imports whom in the package, read off the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "xkv_fx"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_name(path) for path in FILES}

# A room may import itself and all on lower levels, not those beside it.
LEVELS = (
    ("errors",),
    ("files",),
    ("fields",),
    ("file_kinds",),
    ("engine_settings", "formats", "mean_keys", "policy", "provenance", "sizes"),
    ("layers",),
    ("heads",),
    ("budgets",),
    ("runtime",),
    ("passes",),
    ("capture",),
    ("lowering", "planning"),
    ("hf", "engines"),
    ("public_budgets",),
    ("compile_backend",),
    ("api",),
    ("register_attention",),
    ("",),  # the package's face
    ("evaluation",),
    ("cli", "__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def room_of(module: str) -> str:
    """`xkv_fx.passes.tools.graph` -> `passes`; a file beside the rooms is a room of its own, the face is ``."""
    return [*module.split("."), ""][1]


def folder_of(module: str) -> str:
    """`xkv_fx.passes.tools.graph` -> `passes.tools`; a room's own files are in the room."""
    name = module.removeprefix("xkv_fx").lstrip(".")
    is_folder = (PACKAGE / name.replace(".", "/")).is_dir()
    return name if is_folder or "." not in name else name.rpartition(".")[0]


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a file of `package` imports, wherever in it the import stands.

    A string that names a module of ours counts as an import of it, since that is how one is imported by a variable.
    """
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
            named = [name for name in node.args[:1] if isinstance(name, ast.Constant)]
            yield from ((node.lineno, str(name.value)) for name in named if name.value not in MODULES)
        elif isinstance(node, ast.Constant) and node.value in MODULES and node.value != "xkv_fx":
            yield node.lineno, node.value


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Line and full name of every module that a file imports."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return list(imported_modules(path.read_text(encoding="utf-8"), package))


def import_graph() -> nx.DiGraph:
    """An edge from each module of the package to each of its own that it imports."""
    graph = nx.DiGraph()
    graph.add_nodes_from(MODULES)
    for path in FILES:
        others = {module for _, module in imports_of(path) if module in MODULES} - {module_name(path)}
        graph.add_edges_from((module_name(path), module) for module in others)
    return graph
