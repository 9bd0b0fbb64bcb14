"""Plans that need no measuring: all layers alike, as large as the bytes allow."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from xkv_fx.budgets import Plan
from xkv_fx.formats import LayerFormats, pair_name
from xkv_fx.layers import LayerSpec
from xkv_fx.mean_keys import MeanKeys
from xkv_fx.planning.data.grid import can_store
from xkv_fx.policy import Policy


def even_plan(
    layers: Sequence[LayerSpec],
    policy: Policy,
    formats: LayerFormats | None,
    most: int,
    kv_bytes: int,
    batch_size: int,
    max_new_tokens: int,
    mean_keys: MeanKeys | None = None,
) -> Plan | None:
    """The largest plan of equal capacities and formats that allocates at most `kv_bytes`; None if not even one slot a
    layer fits.

    Args:
        most: the largest capacity, such as the tokens of the longest prompt.
        mean_keys: what is taken off keys that are stored in fewer bits.
    """

    def of(capacity: int) -> Plan:
        return Plan((capacity,) * len(layers), policy, formats=(formats,) * len(layers), mean_keys=mean_keys)

    capacities = range(1, most + 1)
    fits = bisect_right(capacities, kv_bytes, key=lambda c: of(c).kv_bytes(layers, batch_size, None, max_new_tokens))
    return of(fits) if fits else None


def even_plans(
    layers: Sequence[LayerSpec],
    policy: Policy,
    pairs: Sequence[LayerFormats | None],
    most: int,
    kv_bytes: int,
    batch_size: int,
    max_new_tokens: int,
    mean_keys: MeanKeys | None = None,
) -> dict[str, Plan]:
    """For each pair of formats that the layers can be stored in, the plan of `even_plan` by its name."""
    plans: dict[str, Plan] = {}
    for pair in pairs:
        if not can_store(layers, pair):
            continue
        plan = even_plan(layers, policy, pair, most, kv_bytes, batch_size, max_new_tokens, mean_keys)
        if plan is not None:
            kept = "all tokens" if min(plan.every_capacity) >= most else "uniform"
            plans[f"{kept}, {pair_name(pair)}"] = plan
    return plans
