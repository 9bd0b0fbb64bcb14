"""Python functions that a graph calls as if they were ops, because a plan or a scorer is fixed in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def named_call(function: F, fake: Callable[..., Any], name: str, module: str) -> F:
    """Give a function what a graph needs of a call.

    Args:
        fake: called alike, on fake values, says what it returns. Passes never run the function itself: a branch or a
            loop of its own over the number of tokens would fix that number in the graph.
        name, module: under which the graph prints it.
    """
    function.fake = fake  # type: ignore[attr-defined]
    function.__name__ = function.__qualname__ = name
    function.__module__ = module
    function.reads_cache = True  # type: ignore[attr-defined]  # for the check that nothing else does
    return function
