"""What a user should know of the limit that was given."""

from __future__ import annotations

from collections.abc import Sequence

from xkv_fx.planning.fit.data import Candidate

# A divergence below this is not worth a word; above it, a larger cache that leaves a quarter of it is named.
_NOTHING = 0.002
_WORTH_IT = 0.25


def advice_on_limit(chosen: Candidate, curve: Sequence[tuple[int, float]]) -> tuple[str, ...]:
    """What the limit costs, and which other one would cost less, or hardly more.

    Args:
        curve: bytes and mean KL of plans made as the chosen one, ascending.
    """
    kl, kv_bytes = chosen.mean_kl, chosen.kv_bytes
    if kl <= _NOTHING:
        said = [f"this limit costs hardly anything: {kl:.4f} nats from the full cache on held-out prompts"]
        smaller = next(((size, other) for size, other in curve if size < kv_bytes and other <= _NOTHING), None)
        if smaller is not None:
            said.append(f"{smaller[0]:,} bytes would do: {smaller[1]:.4f} nats")
        return tuple(said)
    said = [f"this limit costs {kl:.3f} nats from the full cache on held-out prompts"]
    larger = next(((size, other) for size, other in curve if size > kv_bytes and other <= _WORTH_IT * kl), None)
    if larger is not None:
        said.append(f"{larger[0]:,} bytes would cost {larger[1]:.4f}")
    return tuple(said)
