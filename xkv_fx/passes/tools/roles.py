"""Roles of nodes: what a pass leaves for later passes to find.

A role lives in `node.meta`, not in the node's name: a model may have a weight that is called `length`.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from xkv_fx.errors import PassError

_ROLE = "xkv_role"
LENGTH = "length"
"""int64 `[rows]`, the valid tokens of each row in a graph of prompts."""
FED = "fed"
"""As `LENGTH`, of all tokens that the graph is fed, where it reads a text again and keeps the first reading alone."""
VALID = "valid"
"""The input that says which tokens are not padding, bool `[rows, S]`."""


def give_role(node: Node, role: str) -> None:
    """Let later passes find a node. Inputs that are buffers of a state have the buffer's name as their role."""
    node.meta[_ROLE] = role


def role_of(node: Node) -> str | None:
    """The role of a node, None if it has none."""
    role: str | None = node.meta.get(_ROLE)
    return role


def find_role(graph: Graph, role: str) -> Node | None:
    """The node of that role, None if there is none."""
    return next((node for node in graph.nodes if role_of(node) == role), None)


def with_role(graph: Graph, role: str) -> Node:
    """The node of that role.

    Raises:
        PassError: there is none; a pass that gives it must run before.
    """
    found = find_role(graph, role)
    if found is None:
        raise PassError(f"no node of the graph has the role {role!r}; the pass that gives it has not run")
    return found


def take_role(graph: Graph, role: str) -> Node:
    """The node of that role, which loses it.

    Raises:
        PassError: as `with_role`.
    """
    node = with_role(graph, role)
    del node.meta[_ROLE]
    return node


def nodes_by_role(graph: Graph) -> dict[str, Node]:
    """Every node that has a role, keyed by the role."""
    return {role: node for node in graph.nodes if (role := role_of(node)) is not None}
