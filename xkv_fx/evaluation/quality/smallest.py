"""The smallest share of the full cache whose mean KL stays under a bound, for several ways to share a total."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

import xkv_fx
from xkv_fx.errors import BudgetError
from xkv_fx.evaluation.quality.held_out import measure_held_out
from xkv_fx.hf.capture import capture
from xkv_fx.layers import HasItemSize, with_itemsize
from xkv_fx.planning.data.calibration_data import Calibration
from xkv_fx.planning.data.profile_data import Profile
from xkv_fx.planning.measure.team import Progress
from xkv_fx.planning.measure.verify import VERIFY_CONTINUATION
from xkv_fx.planning.solve.constraints import bytes_of_fraction
from xkv_fx.public_budgets import Budgets

# Totals that are tried for each allocator in one round; each round leaves one gap between two of them.
_TRIED = 6
Ways = Mapping[str, tuple[Profile | Calibration, str | None]]


def smallest_shares(
    model: Any,
    ways: Ways,
    prompts: Sequence[Tensor],
    kl: float = 0.02,
    context: int | None = None,
    continuation: int = VERIFY_CONTINUATION,
    rounds: int = 2,
    progress: Progress | None = None,
    dtype: HasItemSize | None = None,
) -> dict[str, float | None]:
    """For each way the smallest fraction of a full cache's bytes whose held-out mean KL is at most `kl`.

    All ways share one prefill of each prompt, and each round tries six totals of each. As in `xkv_fx.fit_quality`, that
    more tokens never raise the KL is taken for granted between the plans tried.

    Args:
        model: a transformers causal language model.
        ways: names, each with what to solve from and the allocator, None for its own; all of one policy.
        prompts: int64 `[1, S + continuation]`, which nothing was measured from before.
        kl: nats.
        context: tokens of prompt; S of the longest prompt by default.
        rounds: two find the fraction to within 2 %, three to within 0.3 %.
        dtype: that bytes are counted in; the model's own by default.

    Returns:
        a fraction, or None where even full capacities stray further (generated tokens then push out others).

    Raises:
        BudgetError: no ways, an invalid bound, or as `xkv_fx.verify`.
    """
    if not ways or not (isinstance(kl, float | int) and kl > 0 and math.isfinite(kl)) or rounds < 1:
        raise BudgetError(f"give at least one way, one round and a kl above 0; got {len(ways)}, {rounds}, {kl!r}")
    context = max(ids.shape[1] for ids in prompts) - continuation if context is None else context
    low, high = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 1.0)
    captured = capture(model, decode=False)
    open_ways, found = set(ways), dict[str, float | None]()
    for turn in range(rounds):
        if not open_ways:
            break
        tried: list[tuple[str, float]] = []
        plans: list[Budgets] = []
        for name in sorted(open_ways):
            source, allocator = ways[name]
            fractions = np.linspace(low[name], high[name], _TRIED + 2)[1:].tolist()
            for fraction in fractions if turn == 0 else fractions[:-1]:
                tried.append((name, fraction))
                layers = with_itemsize(source.layers, None if dtype is None else dtype.itemsize)
                kv_bytes = bytes_of_fraction(fraction, layers, context)
                plans.append(xkv_fx.solve(source, kv_bytes=kv_bytes, context=context, allocator=allocator, dtype=dtype))

        def report(done: int, total: int, before: int = turn * len(prompts)) -> None:
            if progress is not None:
                progress(before + done, rounds * len(prompts))

        measured = measure_held_out(captured, plans, prompts, continuation, progress=report).kl.mean(0)
        for name in sorted(open_ways):
            means = [
                (fraction, float(mean))
                for (owner, fraction), mean in zip(tried, measured, strict=True)
                if owner == name
            ]
            enough = [fraction for fraction, mean in means if mean <= kl]
            if enough:
                high[name] = found[name] = enough[0]
                low[name] = max((fraction for fraction, _ in means if fraction < enough[0]), default=low[name])
            elif turn == 0:
                found[name] = None
                open_ways.discard(name)
            else:
                low[name] = means[-1][0]
    return found
