"""The plans that are compared: groups of them, each of equal bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import xkv_fx
from xkv_fx.errors import BudgetError
from xkv_fx.layers import LayerSpec
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.data.profile_data import Profile
from xkv_fx.planning.measure.verify import uniform_like
from xkv_fx.planning.solve.constraints import whole_tokens
from xkv_fx.planning.solve.plan import uniform_within_bytes
from xkv_fx.policy import Policy
from xkv_fx.public_budgets import Budgets

UNIFORM = "uniform"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan in a comparison.

    Attributes:
        name: of the allocator, or of its file.
        size: of its group, such as `"25.0%"`; plans of a group take equal bytes.
        budgets: the plan.
    """

    name: str
    size: str
    budgets: Budgets

    @property
    def policy(self) -> Policy:
        return self.budgets.policy


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is asked: a plan, or without budgets a quantized cache of transformers'."""

    name: str
    size: str
    budgets: Budgets | None


def label_of(fraction: float) -> str:
    """What a share of the full cache is called."""
    return f"{fraction:.1%}"


def candidates_of_fractions(
    layers: Sequence[LayerSpec],
    context: int,
    fractions: Iterable[float],
    measured: Sequence[Profile | Calibration] = (),
    allocators: Sequence[str] | None = None,
    scorers: Sequence[str] = (),
) -> tuple[Candidate, ...]:
    """For each share of layers x context: what the allocators make of each profile or calibration, and a uniform plan
    for each policy of theirs and each further scorer.

    Args:
        allocators: names; each is used for those that can be solved by it. By default each one's own.
        scorers: names of scorers to add uniform plans for, under the eviction of what was measured.

    Raises:
        BudgetError: a fraction out of range, or an allocator that none of `measured` can be solved by.
    """
    found: list[Candidate] = []
    for fraction in fractions:
        size, total = label_of(fraction), _tokens(fraction, layers, context)
        found += _solved(measured, allocators, size, context, total_tokens=total)
        capacities = tuple(total // len(layers) + (layer < total % len(layers)) for layer in range(len(layers)))
        found += [Candidate(UNIFORM, size, Budgets(capacities, policy)) for policy in _policies(measured, scorers)]
    return tuple(found)


def candidates_of_bytes(
    layers: Sequence[LayerSpec],
    context: int,
    sizes: Mapping[str, int],
    measured: Sequence[Profile | Calibration] = (),
    allocators: Sequence[str] | None = None,
    scorers: Sequence[str] = (),
) -> tuple[Candidate, ...]:
    """As `candidates_of_fractions`, for named sizes in bytes; one that is above the full cache's is left out."""
    full_bytes = sum(spec.slot_bytes() * spec.effective_capacity(context) for spec in layers)
    found: list[Candidate] = []
    for size, kv_bytes in sizes.items():
        if kv_bytes >= full_bytes:
            continue
        found += _solved(measured, allocators, size, context, kv_bytes=kv_bytes)
        even = uniform_within_bytes(layers, context, kv_bytes)
        found += [
            Candidate(UNIFORM, size, Budgets(tuple(even.tolist()), policy)) for policy in _policies(measured, scorers)
        ]
    return tuple(found)


def candidates_of_plans(
    layers: Sequence[LayerSpec], plans: Mapping[str, Budgets], size: str | None = None
) -> tuple[Candidate, ...]:
    """Plans by hand or from files, beside a uniform one for each policy of theirs.

    Raises:
        BudgetError: another number of layers.
    """
    found: list[Candidate] = []
    for name, budgets in plans.items():
        budgets.check_layers(layers)
        found.append(Candidate(name, size or "given", budgets))
    for policy in dict.fromkeys(budgets.policy for budgets in plans.values()):
        first = next(budgets for budgets in plans.values() if budgets.policy == policy)
        found.append(Candidate(UNIFORM, size or "given", uniform_like(first, layers)))
    return tuple(found)


def check_equal_bytes(candidates: Sequence[Candidate], layers: Sequence[LayerSpec], new_tokens: int) -> None:
    """Check that the plans of each size take the same bytes, to within one slot where layers' slots differ in size.

    Args:
        new_tokens: room that is set aside for generated tokens, under `eviction="append"`.

    Raises:
        BudgetError: they do not.
    """
    slots = {spec.slot_bytes() for spec in layers}
    tolerance = max(slots) if len(slots) > 1 else 0
    sizes: dict[str, dict[str, int]] = {}
    for candidate in candidates:
        taken = candidate.budgets.kv_bytes(layers, max_new_tokens=new_tokens)
        named = f"{candidate.name} ({candidate.policy.scorer}, {candidate.policy.eviction})"
        sizes.setdefault(candidate.size, {})[named] = taken
    for size, taken_by in sizes.items():
        if max(taken_by.values()) - min(taken_by.values()) > tolerance:
            listed = ", ".join(f"{name} {taken:,}" for name, taken in taken_by.items())
            raise BudgetError(
                f"plans are compared at equal bytes, but those of the size {size!r} take different ones: {listed}"
            )


def _tokens(fraction: float, layers: Sequence[LayerSpec], context: int) -> int:
    if not 0 < fraction <= 1:
        raise BudgetError(f"a fraction must be above 0 and at most 1; got {fraction!r}")
    return whole_tokens(fraction, len(layers), context)


def _solved(
    measured: Sequence[Profile | Calibration],
    allocators: Sequence[str] | None,
    size: str,
    context: int,
    total_tokens: int | None = None,
    kv_bytes: int | None = None,
) -> list[Candidate]:
    """What the allocators make of each source that they can read, under one of the two constraints."""
    found = []
    for source, name in _solvable(measured, allocators):
        budgets = xkv_fx.solve(source, total_tokens=total_tokens, kv_bytes=kv_bytes, context=context, allocator=name)
        found.append(Candidate(budgets.provenance.allocator or name or "", size, budgets))
    return found


def _solvable(
    measured: Sequence[Profile | Calibration], allocators: Sequence[str] | None
) -> list[tuple[Profile | Calibration, str | None]]:
    """Each source with each of the allocators that can read it; uniform is added elsewhere."""
    if allocators is None:
        return [(source, None) for source in measured]
    found: list[tuple[Profile | Calibration, str | None]] = []
    for name in allocators:
        if name == UNIFORM:
            continue
        errors = []
        for source in measured:
            try:
                xkv_fx.solve(source, total_tokens=len(source.layers), allocator=name)
            except BudgetError as error:
                errors.append(str(error))
            else:
                found.append((source, name))
                break
        else:
            raise BudgetError(errors[0] if errors else f"the allocator {name!r} needs a profile or a calibration")
    return found


def _policies(measured: Sequence[Profile | Calibration], scorers: Sequence[str]) -> list[Policy]:
    """The policies that uniform plans are made for."""
    own = list(dict.fromkeys(source.policy for source in measured)) or ([] if scorers else [Policy()])
    base = own[0] if own else Policy()
    further = [dataclasses.replace(base, scorer=name, scorer_options={}) for name in scorers]
    return list(dict.fromkeys([*own, *further]))
