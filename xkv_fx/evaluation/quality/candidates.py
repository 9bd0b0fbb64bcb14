"""The plans that are compared: groups of them, each of equal bytes."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence

import xkv_fx
from xkv_fx.budgets import Plan
from xkv_fx.errors import BudgetError
from xkv_fx.formats import LayerFormats, codes_keys, pair_name
from xkv_fx.heads import planned_slot_bytes
from xkv_fx.layers import HasItemSize, LayerSpec, with_itemsize
from xkv_fx.mean_keys import MeanKeys
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.data.profile_data import Profile
from xkv_fx.planning.measure.verify import uniform_like
from xkv_fx.planning.solve.constraints import bytes_of_fraction, full_bytes
from xkv_fx.planning.solve.plan import uniform_within_bytes
from xkv_fx.policy import Policy
from xkv_fx.provenance import Provenance
from xkv_fx.public_budgets import Budgets

UNIFORM, CALIBRATED = "uniform", "calibrated"
JOINT = "joint"
"""Capacities and formats together, from a calibration of formats."""
_BY_HEAD = " by head"


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
    """What is asked: a plan, or without budgets a quantized cache of transformers', or kvpress."""

    name: str
    size: str
    budgets: Budgets | None


def label_of(fraction: float) -> str:
    """What a share of the full cache is called."""
    return f"{fraction:.1%}"


def bits_per_element(budgets: Plan, layers: Sequence[LayerSpec]) -> float:
    """Bits that an element of a kept key or value takes on average, scales and zeros counted."""
    elements = dataclasses.replace(budgets, formats=None).kv_bytes(with_itemsize(layers, 1))
    return 8 * budgets.kv_bytes(layers) / elements


def candidates_of_fractions(
    layers: Sequence[LayerSpec],
    context: int,
    fractions: Iterable[float],
    measured: Sequence[Profile | Calibration] = (),
    allocators: Sequence[str] | None = None,
    scorers: Sequence[str] = (),
    formats: Sequence[LayerFormats] = (),
    dtype: HasItemSize | None = None,
) -> tuple[Candidate, ...]:
    """For each share of the bytes of a full cache: what the allocators make of each profile or calibration, of a
    profile also in each of `formats`, and for each policy of theirs and each further scorer a uniform plan and one for
    each of `formats` in all layers.

    Args:
        allocators: names; each is used for those that can be solved by it, `"joint"` for calibrations of formats. By
            default each one's own.
        scorers: names of scorers to add uniform plans for, under the eviction of what was measured.
        formats: of keys and values.
        dtype: that bytes are counted in; the model's own by default.

    Raises:
        BudgetError: a fraction out of range, or an allocator that none of `measured` can be solved by.
    """
    counted = _counted(layers, dtype)
    sizes = {label_of(fraction): bytes_of_fraction(fraction, counted, context) for fraction in fractions}
    return _of_bytes(layers, context, sizes, measured, allocators, scorers, formats, dtype)


def candidates_of_bytes(
    layers: Sequence[LayerSpec],
    context: int,
    sizes: Mapping[str, int],
    measured: Sequence[Profile | Calibration] = (),
    allocators: Sequence[str] | None = None,
    scorers: Sequence[str] = (),
    formats: Sequence[LayerFormats] = (),
    dtype: HasItemSize | None = None,
) -> tuple[Candidate, ...]:
    """As `candidates_of_fractions`, for named sizes in bytes; one that is above the full cache's is left out."""
    most = full_bytes(_counted(layers, dtype), context)
    smaller = {size: kv_bytes for size, kv_bytes in sizes.items() if kv_bytes < most}
    return _of_bytes(layers, context, smaller, measured, allocators, scorers, formats, dtype)


def _of_bytes(
    layers: Sequence[LayerSpec],
    context: int,
    sizes: Mapping[str, int],
    measured: Sequence[Profile | Calibration],
    allocators: Sequence[str] | None,
    scorers: Sequence[str],
    formats: Sequence[LayerFormats],
    dtype: HasItemSize | None,
) -> tuple[Candidate, ...]:
    counted, found = _counted(layers, dtype), list[Candidate]()
    for size, kv_bytes in sizes.items():
        for source, name in _solvable(measured, allocators):
            allocator = None if name == JOINT else name
            budgets = xkv_fx.solve(source, kv_bytes=kv_bytes, context=context, allocator=allocator, dtype=dtype)
            found.append(Candidate(by_head(name, source) if name else own_name(source), size, budgets))
        for pair, source in itertools.product(formats, _profiles(measured, allocators)):
            if _slot_each(source.layers, dtype, pair) <= kv_bytes:
                budgets = xkv_fx.solve(source, kv_bytes=kv_bytes, context=context, dtype=dtype, formats=pair)
                budgets = dataclasses.replace(budgets, mean_keys=_mean_keys(measured) if codes_keys(pair) else None)
                found.append(Candidate(f"{own_name(source)}, {name_of_format(pair)}", size, budgets))
        for policy in _policies(measured, scorers):
            found.append(Candidate(UNIFORM, size, _alike(policy, counted, context, kv_bytes)))
            for pair in formats:
                if _slot_each(layers, dtype, pair) <= kv_bytes:
                    alike = _alike(policy, counted, context, kv_bytes, pair, _mean_keys(measured))
                    found.append(Candidate(name_of_format(pair), size, alike))
    return tuple(found)


def name_of_format(pair: LayerFormats) -> str:
    """What a plan is called that stores all layers so."""
    return f"all {pair_name(pair)}"


def is_of_one_format(name: str) -> bool:
    """Whether `name_of_format` gave that name."""
    return name.startswith("all ")


def formats_of(measured: Iterable[Profile | Calibration]) -> tuple[LayerFormats, ...]:
    """The formats that calibrations measured, besides the model's dtype."""
    calibrations = (source for source in measured if isinstance(source, Calibration))
    return tuple(dict.fromkeys(pair for source in calibrations for pair in source.pairs if pair is not None))


def _alike(
    policy: Policy,
    layers: Sequence[LayerSpec],
    context: int,
    kv_bytes: int,
    pair: LayerFormats | None = None,
    mean_keys: MeanKeys | None = None,
) -> Budgets:
    """The largest plan of at most so many bytes whose layers hold equally much in one format."""
    capacities = tuple(uniform_within_bytes(layers, context, kv_bytes, pair).tolist())
    provenance = Provenance(allocator=UNIFORM, context=context)
    return Budgets(capacities, policy, provenance, formats=(pair,) * len(layers), mean_keys=mean_keys)


def _slot_each(layers: Sequence[LayerSpec], dtype: HasItemSize | None, pair: LayerFormats) -> int:
    """The bytes of the smallest plan in these formats, a slot of each layer."""
    return sum(spec.slot_bytes(formats=pair) for spec in _counted(layers, dtype))


def _profiles(measured: Iterable[Profile | Calibration], allocators: Sequence[str] | None) -> list[Profile]:
    """Those whose plans are asked for by their own allocator."""
    asked = allocators is None or "xkv" in allocators
    return [source for source in measured if asked and isinstance(source, Profile)]


def _mean_keys(measured: Iterable[Profile | Calibration]) -> MeanKeys | None:
    """Those that a calibration found, which cost a plan of one format nothing either: they are the model's, whatever
    its tokens are ranked by."""
    calibrations = (source for source in measured if isinstance(source, Calibration))
    return next((source.layer_mean_keys for source in calibrations if source.mean_keys is not None), None)


def _counted(layers: Sequence[LayerSpec], dtype: HasItemSize | None) -> tuple[LayerSpec, ...]:
    return with_itemsize(layers, None if dtype is None else dtype.itemsize)


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


def check_equal_bytes(candidates: Sequence[Candidate], layers: Sequence[LayerSpec], context: int) -> None:
    """Check that the plans of each size take the same bytes: to within one slot where slots differ in size; a plan that
    holds all of `context` tokens may take less.

    Room for appended tokens comes on top, so that plans that append are not compared with others.

    Args:
        layers: with the bytes of an element that are counted.

    Raises:
        BudgetError: they do not.
    """
    for size in dict.fromkeys(candidate.size for candidate in candidates):
        group = [candidate for candidate in candidates if candidate.size == size]
        taken = {candidate: candidate.budgets.kv_bytes(layers) for candidate in group}
        slots = {
            planned_slot_bytes(spec, formats)
            for candidate in group
            for spec, formats in zip(layers, candidate.budgets.layer_formats, strict=True)
        }
        tolerance = max(slots) if len(slots) > 1 else 0
        least = max(taken.values()) - tolerance
        full = [spec.effective_capacity(context) for spec in layers]
        same = all(
            kv_bytes >= least or all(map(operator.ge, candidate.budgets.slots(layers), full))
            for candidate, kv_bytes in taken.items()
        )
        if not same or len({candidate.policy.eviction == "append" for candidate in group}) > 1:
            listed = ", ".join(
                f"{of.name} ({of.policy.scorer}, {of.policy.eviction}) {kv_bytes:,}" for of, kv_bytes in taken.items()
            )
            raise BudgetError(
                f"plans are compared at equal bytes, but those of the size {size!r} take different ones (under "
                f"eviction='append' new tokens take more besides): {listed}"
            )


def own_name(source: Profile | Calibration) -> str:
    """What the plan of a source is called where no allocator is named."""
    if isinstance(source, Profile):
        return by_head("xkv", source)
    return by_head(CALIBRATED if source.formats is None else JOINT, source)


def by_head(name: str, source: Profile | Calibration | None = None) -> str:
    """The name of a plan that was solved so from measurements by KV head; the name itself where `source` is one by
    layer."""
    return name if source is not None and source.heads is None else name + _BY_HEAD


def _solvable(
    measured: Sequence[Profile | Calibration], allocators: Sequence[str] | None
) -> list[tuple[Profile | Calibration, str | None]]:
    """Each source with each of the allocators that can read it; uniform is added elsewhere."""
    if allocators is None:
        return [(source, None) for source in measured]
    joint = [source for source in measured if isinstance(source, Calibration) and source.formats is not None]
    found: list[tuple[Profile | Calibration, str | None]] = []
    for name in allocators:
        if name == UNIFORM:
            continue
        if name == JOINT:
            if not joint:
                raise BudgetError(f"the allocator {JOINT!r} needs a calibration of formats")
            found += [(source, JOINT) for source in joint]
            continue
        errors, ways = [], set[bool]()
        for source in measured:
            if source in joint or (source.heads is None) in ways:
                continue
            try:
                xkv_fx.solve(source, fraction=1.0, allocator=name)
            except BudgetError as error:
                errors.append(str(error))
            else:
                found.append((source, name))
                ways.add(source.heads is None)
        if not ways:
            raise BudgetError(errors[0] if errors else f"the allocator {name!r} needs a profile or a calibration")
    return found


def _policies(measured: Sequence[Profile | Calibration], scorers: Sequence[str]) -> list[Policy]:
    """The policies that uniform plans are made for."""
    own = list(dict.fromkeys(source.policy for source in measured)) or ([] if scorers else [Policy()])
    base = own[0] if own else Policy()
    further = [dataclasses.replace(base, scorer=name, scorer_options={}) for name in scorers]
    return list(dict.fromkeys([*own, *further]))
