"""Which room of the package imports which, as a picture for CONTRIBUTING.md.

`python docs/draw_imports.py` reads the imports off the sources, checks them, and writes `docs/imports.svg`. Rooms stand
on the levels that `tests/import_graph.py` gives them, with their folders inside; every arrow points down. An arrow
that follows from others is left out. With a circle or an arrow up nothing is drawn, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import networkx as nx
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from import_graph import LEVEL, LEVELS, folder_of, import_graph, room_of  # noqa: E402

FACE = "import xkv_fx"
WIDTH = 8.0
BOX, GAP, ROW = 1.25, 0.18, 0.34
"""Inches: the width of a folder, the space between two of them, and the height of a line of text."""
ASIDE = {
    "register_attention": 2.4, "compile_backend": -2.2, "public_budgets": 0.1, "hf": 1.6, "engines": 1.3,
    "lowering": 2.15, "planning": -3.3, "formats": -0.4, "fields": 0.9, "files": 0.9, "errors": -0.2,
}  # fmt: skip
"""Inches to the right of its place, for a room that an arrow would otherwise run behind."""
GROUND = ("#eef3f8", "#9db4cc")
ROOM = ("#d7e5f3", "#4f7cac")


def faults(modules: nx.DiGraph) -> list[str]:
    """A sentence for each circle of modules or of a room's folders, and for each import that does not point down."""
    found = []
    for source, target in modules.edges:
        above, below = room_of(source), room_of(target)
        if above != below and LEVEL[below] >= LEVEL[above]:
            found.append(f"{source} imports {target}, which is not on a lower level")
    graphs = [modules, *(folders_of(modules, room) for room in dict.fromkeys(map(room_of, modules)))]
    for graph in graphs:
        for names in nx.strongly_connected_components(graph):
            if len(names) > 1:
                found.append(f"these import each other in a circle: {', '.join(sorted(names))}")
    return found


def rooms_of(modules: nx.DiGraph) -> nx.DiGraph:
    """An arrow from each room to each other that it imports."""
    rooms = nx.DiGraph()
    rooms.add_nodes_from(map(room_of, modules))
    rooms.add_edges_from((room_of(source), room_of(target)) for source, target in modules.edges)
    rooms.remove_edges_from(list(nx.selfloop_edges(rooms)))
    return rooms


def folders_of(modules: nx.DiGraph, room: str) -> nx.DiGraph:
    """An arrow from each folder of a room to each other that it imports; files of the room's own are not a folder."""
    folders = nx.DiGraph()
    folders.add_nodes_from(folder_of(name) for name in modules if _is_inside(name, room))
    for source, target in modules.edges:
        if _is_inside(source, room) and _is_inside(target, room) and folder_of(source) != folder_of(target):
            folders.add_edge(folder_of(source), folder_of(target))
    return folders


def _is_inside(module: str, room: str) -> bool:
    return room_of(module) == room != folder_of(module)


class _Picture:
    """Boxes at places in inches, from the bottom up, and arrows between them."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(WIDTH, height))
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, height))
        self.axes.set_axis_off()
        self.boxes: dict[str, tuple[float, float, float, float]] = {}

    def box(
        self, key: str, label: str, place: tuple[float, float, float, float], colours: tuple[str, str], depth: int
    ) -> None:
        """A frame of `x, y, width, height` with its name in the upper left corner, or in the middle of a small one."""
        x, y, width, height = self.boxes[key] = place
        style = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": colours[0], "edgecolor": colours[1]}
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, zorder=2 * depth, linewidth=1, **style))
        is_small = height <= ROW + 0.01
        at = (x + width / 2, y + height / 2) if is_small else (x + 0.08, y + height - ROW / 2)
        self.axes.text(
            *at, label, ha="center" if is_small else "left", va="center", zorder=2 * depth + 1,
            fontsize=8 if depth > 1 else 9, fontweight="normal" if depth > 1 else "bold",
        )  # fmt: skip

    def arrow(self, above: str, below: str, colour: str, depth: int) -> None:
        """From the lower edge of one box to the upper edge of another, where they overlap if they do."""
        (x, y, width, _), (to_x, to_y, to_width, to_height) = self.boxes[above], self.boxes[below]
        left, right = max(x, to_x), min(x + width, to_x + to_width)
        start, end = ((left + right) / 2,) * 2 if left < right else (x + width / 2, to_x + to_width / 2)
        self.axes.add_patch(
            FancyArrowPatch(
                (start, y), (end, to_y + to_height), arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0,
                color=colour, linewidth=1, zorder=2 * depth + 1,
            )
        )  # fmt: skip


def draw(modules: nx.DiGraph, path: Path) -> None:
    """Write the picture; the ending of `path` decides the format."""
    rooms = rooms_of(modules)
    layers = {room: _layers(folders_of(modules, room)) for room in rooms}
    levels = [[room for room in level if room in rooms] for level in LEVELS]
    heights = [max((_height(layers[room]) for room in level), default=0.0) for level in levels]
    picture = _Picture(sum(height + 0.32 for height in heights) + 0.2)
    y = 0.2
    for level, height in zip(levels, heights, strict=True):
        widths = [_width(layers[room], room) for room in level]
        x = (WIDTH - sum(widths) - 4 * GAP * (len(level) - 1)) / 2
        for room, width in zip(level, widths, strict=True):
            place = x + ASIDE.get(room, 0.0), y, width, _height(layers[room])
            colours = ROOM if layers[room] or LEVEL[room] > LEVEL["budgets"] else GROUND
            picture.box(room, room or FACE, place, colours, depth=1)
            _draw_folders(picture, modules, room, layers[room])
            x += width + 4 * GAP
        y += height + 0.32
    for above, below in nx.transitive_reduction(rooms).edges:
        picture.arrow(above, below, ROOM[1], depth=0)
    matplotlib.rcParams["svg.hashsalt"] = "xkv_fx"  # the same picture is the same file
    picture.figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_folders(picture: _Picture, modules: nx.DiGraph, room: str, layers: Sequence[Sequence[str]]) -> None:
    x, y, width, _ = picture.boxes[room]
    for number, layer in enumerate(layers):
        left = x + (width - len(layer) * (BOX + GAP) + GAP) / 2
        for place, folder in enumerate(layer):
            at = (left + place * (BOX + GAP), y + 0.12 + number * (ROW + 0.3), BOX, ROW)
            label = folder.removeprefix(f"{room}.").replace(".", "/") + "/"
            picture.box(folder, label, at, ("white", ROOM[1]), depth=2)
    for above, below in nx.transitive_reduction(folders_of(modules, room)).edges:
        picture.arrow(above, below, "#7a7a7a", depth=2)


def _layers(folders: nx.DiGraph) -> list[list[str]]:
    """Folders that import no other first, then those that import only these, and so on."""
    return [sorted(layer) for layer in nx.topological_generations(folders.reverse())]


def _height(layers: Sequence[Sequence[str]]) -> float:
    return ROW + (0.12 + len(layers) * (ROW + 0.3) - 0.3 if layers else 0.0)


def _width(layers: Sequence[Sequence[str]], room: str) -> float:
    return max(0.3 + 0.085 * len(room or FACE), *(len(layer) * (BOX + GAP) + GAP for layer in layers), BOX)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "imports.svg")
    options = parser.parse_args(arguments)
    modules = import_graph()
    found = faults(modules)
    for fault in found:
        print(fault, file=sys.stderr)
    if found:
        raise SystemExit(1)
    draw(modules, options.out)


if __name__ == "__main__":
    main()
