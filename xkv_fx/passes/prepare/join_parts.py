"""Tensors that are made empty and then filled part by part, as one concatenation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from xkv_fx.passes.tools.graph import arguments, changed_by
from xkv_fx.passes.tools.inline import inline

aten = torch.ops.aten


def join_parts(made: Node) -> None:
    """Where `made` is an empty tensor whose parts along its last dimension are filled before attention reads it,
    and nothing else does, join these parts instead.

        e = new_empty(...); copy_(e[..., :n], a); copy_(e[..., n:], b)  ->  cat((a, b), -1)
    """
    if made.target is not aten.new_empty.default:
        return
    readers = [user for user in made.users if user.target is torch.ops.xkv.attention.default]
    parts = [_part(made, user) for user in made.users if user not in readers]
    found = sorted((part for part in parts if part is not None), key=lambda part: part[0])
    if not readers or not found or len(found) < len(parts) or not _fill(made, [part[:2] for part in found]):
        return
    copies = [copy for _, _, copy in found]
    order = {node: place for place, node in enumerate(made.graph.nodes)}
    places = [order[copy] for copy in copies]
    between = [node for node, place in order.items() if min(places) <= place <= max(places)]
    if max(places) > min(order[reader] for reader in readers):
        return
    if any(changed_by(node) for node in between if node not in copies):  # it may change what was copied
        return
    inputs = [source for copy in copies for source in copy.args[:2]]
    with made.graph.inserting_before(between[-1].next):
        joined = inline(made.graph, _joined, *inputs)  # type: ignore[arg-type]
    for reader in readers:
        reader.replace_input_with(made, joined)
    for copy in copies:
        made.graph.erase_node(copy)


def _part(made: Node, view: Node) -> tuple[int, int, Node] | None:
    """Beginning and end of a part along the last dimension, and the one node that copies something there."""
    shape = made.meta["val"].shape
    if view.target is not aten.slice.Tensor or len(view.users) != 1:
        return None
    (copy,) = view.users
    given = arguments(view)
    bounds = given["start"] or 0, shape[-1] if given["end"] is None else given["end"]
    if given["dim"] % len(shape) != len(shape) - 1 or given["step"] != 1 or not all(isinstance(b, int) for b in bounds):
        return None
    source = copy.args[1] if copy.target is aten.copy_.default and copy.args[0] is view and not copy.users else None
    if not isinstance(source, Node) or source.meta["val"].dtype != made.meta["val"].dtype:
        return None
    return bounds[0], min(bounds[1], shape[-1]), copy


def _fill(made: Node, parts: Sequence[tuple[int, int]]) -> bool:
    """Whether parts, in order, make up the whole."""
    ends = [0, *(end for _, end in parts)]
    return ends[-1] == made.meta["val"].shape[-1] and ends[:-1] == [start for start, _ in parts]


def _joined(*given: Tensor) -> Tensor:
    """Join the parts; `given` alternates between a place and what is copied there."""
    pairs = zip(given[::2], given[1::2], strict=True)
    return torch.cat([source.expand(place.shape) for place, source in pairs], -1)
