"""Allocators: named ways to share a total among layers. The solver is one, uniform another; users register more."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xkv_fx.errors import BudgetError
from xkv_fx.planning.curves import shape_of
from xkv_fx.planning.limits import make_limits
from xkv_fx.planning.solve import capacities_for_total


class Allocator(Protocol):
    """Shares `total` tokens among layers.

    Attributes:
        name: recorded in the plan.
    """

    @property
    def name(self) -> str: ...

    def __call__(
        self,
        curves: NDArray[np.floating[Any]],
        total: int,
        *,
        floor: int = 1,
        caps: ArrayLike | None = None,
        multiple: int = 1,
    ) -> NDArray[np.int64]:
        """Capacities, int64 `[layers]`, that add up to `total`.

        Args:
            curves: retention `[layers, context + 1]`.
            total: the sum of the capacities, exact.
            floor: the fewest slots of every layer; a layer whose cap is lower gets its cap.
            caps: the most slots of each layer, `[layers]`; `context` by default.
            multiple: what capacities should be multiples of, as far as an exact total allows.

        Raises:
            BudgetError: a total below the floors or above the caps, or arguments out of range.
        """
        ...


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A function and its name; what the function returns is checked before it becomes a plan."""

    name: str
    function: Callable[..., Any]

    def __call__(
        self,
        curves: NDArray[np.floating[Any]],
        total: int,
        *,
        floor: int = 1,
        caps: ArrayLike | None = None,
        multiple: int = 1,
    ) -> NDArray[np.int64]:
        limits = make_limits(*shape_of(curves), floor, caps, multiple).for_total(total)
        capacities = np.asarray(self.function(curves, total, floor=floor, caps=limits.caps, multiple=multiple))
        problem = None
        if capacities.dtype.kind not in "iu" or capacities.shape != limits.caps.shape:
            problem = f"{capacities.dtype} {capacities.shape} instead of {limits.layers} whole numbers"
        elif capacities.sum() != total:
            problem = f"a total of {capacities.sum()} tokens instead of {total}"
        elif (capacities < limits.floors).any() or (capacities > limits.caps).any():
            problem = f"capacities outside the floor of {floor} and the caps: {capacities.tolist()}"
        if problem is not None:
            raise BudgetError(f"the allocator {self.name!r} returned {problem}")
        return capacities.astype(np.int64)


_allocators: dict[str, Allocator] = {}
F = TypeVar("F", bound=Callable[..., Any])


def register_allocator(name: str) -> Callable[[F], F]:
    """Function decorator: make an allocator known as `solve(..., allocator=name)`.

    The function is called as `Allocator.__call__` says, with caps always given; what it returns is checked.

    Raises:
        BudgetError: the name is taken.
    """

    def register(function: F) -> F:
        if name in _allocators:
            raise BudgetError(f"an allocator named {name!r} is registered already; choose another name")
        _allocators[name] = _Checked(name, function)
        return function

    return register


def allocator_names() -> tuple[str, ...]:
    """The names of the registered allocators."""
    return tuple(sorted(_allocators))


def allocator(name: str | Allocator) -> Allocator:
    """The allocator registered as `name`, or a given one; what it returns is checked.

    Raises:
        BudgetError: no such allocator, or an object that is none.
    """
    if isinstance(name, _Checked):
        return name
    if not isinstance(name, str):
        if not callable(name) or not isinstance(getattr(name, "name", None), str):
            raise BudgetError(f"an allocator is a registered name, or a callable with a name; got {name!r}")
        return _Checked(name.name, name)
    if name not in _allocators:
        raise BudgetError(f"unknown allocator {name!r}; registered are {', '.join(allocator_names())}")
    return _allocators[name]


register_allocator("xkv")(capacities_for_total)


@register_allocator("uniform")
def uniform(
    curves: NDArray[np.floating[Any]],
    total: int,
    *,
    floor: int = 1,
    caps: ArrayLike | None = None,
    multiple: int = 1,
) -> NDArray[np.int64]:
    """Capacities as equal as total, caps and blocks allow; of what is left, the first layers get a block each."""
    limits = make_limits(*shape_of(curves), floor, caps, multiple).for_total(total)
    lows, block = limits.lows, limits.multiple

    def filled(blocks: int) -> NDArray[np.int64]:
        capacities: NDArray[np.int64] = np.clip(blocks * block, lows, limits.caps)
        return capacities

    # The level that fits in the total while the next does not, or the one that is every layer's cap.
    level = bisect_left(range(-(-limits.context // block)), True, key=lambda blocks: filled(blocks + 1).sum() > total)
    capacities = filled(level)
    room = filled(level + 1) - capacities
    capacities += np.clip(total - capacities.sum() - (np.cumsum(room) - room), 0, room)
    return capacities
