"""Allocators: named ways to share a total among layers. The solver is one, uniform another; users register more."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xkv_fx.errors import BudgetError, did_you_mean
from xkv_fx.planning.data.curves import checked_curves, shape_of
from xkv_fx.planning.solve.fill import Blocks, blocks_of_curves, capacities_for_total, fill, spread
from xkv_fx.planning.solve.limits import Limits, make_limits


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


@dataclasses.dataclass(frozen=True, eq=False)
class _Checked:
    """A function and its name; what the function returns is checked before it becomes a plan.

    Attributes:
        name: recorded in the plan.
        function: as `Allocator.__call__`; one that needs a statistic takes it as a keyword argument of its name.
        reads: what the curves must be, `"retention"` or `"kl"`; None if either will do.
        statistic: the name of a further measurement that it needs, float64 `[layers]`.
        values: that measurement.
    """

    name: str
    function: Callable[..., Any]
    reads: str | None = None
    statistic: str | None = None
    values: NDArray[np.float64] | None = None

    def reading(self, curves: str, statistics: Mapping[str, NDArray[np.float64]]) -> _Checked:
        """This allocator for curves of that kind, with what else was measured.

        Raises:
            BudgetError: it needs other curves, or a statistic that was not measured.
        """
        if self.reads not in (None, curves):
            source = "an xkv_fx.Profile" if self.reads == "retention" else "an xkv_fx.Calibration"
            raise BudgetError(f"the allocator {self.name!r} needs {source}; choose another allocator, or measure that")
        if self.statistic is None:
            return self
        if self.statistic not in statistics:
            raise BudgetError(
                f"the allocator {self.name!r} needs the {self.statistic!r} of each layer, which was not measured here; "
                "profile the model again"
            )
        return dataclasses.replace(self, values=statistics[self.statistic])

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
        bounds: dict[str, Any] = {"floor": floor, "caps": limits.caps, "multiple": multiple}
        if self.statistic is not None:
            bounds[self.statistic] = self.values
        capacities = np.asarray(self.function(curves, total, **bounds))
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


_allocators: dict[str, _Checked] = {}
F = TypeVar("F", bound=Callable[..., Any])


def register_allocator(name: str, reads: str | None = None, statistic: str | None = None) -> Callable[[F], F]:
    """Function decorator: make an allocator known as `solve(..., allocator=name)`.

    The function is called as `Allocator.__call__` says, with caps always given; what it returns is checked.

    Args:
        reads: `"retention"` for an allocator that only makes sense on a profile's curves, `"kl"` for one on a
            calibration's.
        statistic: a name in `Profile.statistics`; those values are passed under it as one more keyword argument.

    Raises:
        BudgetError: the name is taken.
    """

    def register(function: F) -> F:
        if name in _allocators:
            raise BudgetError(f"an allocator named {name!r} is registered already; choose another name")
        _allocators[name] = _Checked(name, function, reads, statistic)
        return function

    return register


def allocator_names() -> tuple[str, ...]:
    """The names of the registered allocators."""
    return tuple(sorted(_allocators))


def allocator(name: str | Allocator) -> _Checked:
    """The allocator registered as `name`, or a given one; what it returns is checked.

    Raises:
        BudgetError: no such allocator, or an object that is not one.
    """
    if isinstance(name, _Checked):
        return name
    if not isinstance(name, str):
        if not callable(name) or not isinstance(getattr(name, "name", None), str):
            raise BudgetError(f"an allocator is a registered name, or a callable with a name; got {name!r}")
        return _Checked(name.name, name)
    if name not in _allocators:
        names = allocator_names()
        raise BudgetError(f"unknown allocator {name!r}; registered are {', '.join(names)}{did_you_mean(name, names)}")
    return _allocators[name]


register_allocator("xkv", reads="retention")(capacities_for_total)


def within_limits(share: Callable[..., NDArray[np.int64]]) -> Callable[..., NDArray[np.int64]]:
    """Function decorator: an allocator from a function of curves, a total, and the limits that follow from floor, caps
    and multiple for that total."""

    @functools.wraps(share)
    def allocate(
        curves: NDArray[np.floating[Any]],
        total: int,
        *,
        floor: int = 1,
        caps: ArrayLike | None = None,
        multiple: int = 1,
        **statistics: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        limits = make_limits(*shape_of(curves), floor, caps, multiple).for_total(total)
        return share(curves, total, limits, **statistics)

    return allocate


@register_allocator("calibrated", reads="kl")
@within_limits
def calibrated(curves: NDArray[np.floating[Any]], total: int, limits: Limits) -> NDArray[np.int64]:
    """The plan with the smallest sum of measured divergences, a quarter of it shared alike by all layers.

    Divergences add up only while they are small, and a layer that seems not to matter alone may matter once others hold
    less too: what all share keeps a plan away from what was never measured. It grows block by block, so that plans are
    nested and a larger total never costs more.
    """
    blocks = blocks_of_curves(checked_curves(curves), limits)
    return fill(dataclasses.replace(blocks, lows=spread(blocks, total // 4)), total)


@within_limits
def _calibrated_by_head(curves: NDArray[np.floating[Any]], total: int, limits: Limits) -> NDArray[np.int64]:
    return fill(blocks_of_curves(checked_curves(curves), limits), total)


CALIBRATED_BY_HEAD = _Checked("calibrated", _calibrated_by_head, "kl")
"""`calibrated` for KV heads: nothing is shared alike, since a head that does not matter leaves the others of its layer
to hold what it lets go of."""


def calibrated_floor(mean: int, limits: Limits) -> int:
    """The fewest slots of a layer when layers have `mean` on average: a quarter of that, or what was asked for."""
    return max(limits.floor, min(mean // 4, limits.context))


@register_allocator("uniform")
@within_limits
def uniform(curves: NDArray[np.floating[Any]], total: int, limits: Limits) -> NDArray[np.int64]:
    """Capacities as equal as total, caps and blocks allow; of what is left, the first layers get a block each."""
    no_gains = np.zeros((limits.layers, -(-limits.context // limits.multiple)))
    return spread(Blocks(no_gains, limits.multiple, limits.lows, limits.caps), total)
