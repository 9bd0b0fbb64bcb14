"""A limit in bytes holds for what is allocated, not only for what was solved."""

from __future__ import annotations

from xkv_fx.budgets import Plan
from xkv_fx.errors import BudgetError
from xkv_fx.runtime.state import CachePlan


def check_limit(budgets: Plan, plan: CachePlan, max_new_tokens: int) -> None:
    """Refuse to allocate more than the bytes that a plan was solved for.

    Args:
        budgets: what was solved; without a limit in bytes, nothing is checked.
        plan: what would be allocated.
        max_new_tokens: the room in it for appended tokens.

    Raises:
        BudgetError: it is more; the message says what makes the difference, and what to do.
    """
    constraint = budgets.provenance.constraint or {}
    limit = constraint.get("kv_bytes")
    if limit is None or plan.kv_bytes <= limit:
        return
    arguments = {"kv_bytes": str(limit), "batch_size": str(plan.rows)}
    counts = [("batch_size", plan.rows, constraint.get("batch_size", 1))]
    if budgets.policy.eviction == "append":
        arguments["max_new_tokens"] = str(max_new_tokens)
        counts.append(("max_new_tokens", max_new_tokens, constraint.get("max_new_tokens", 0)))
    reasons = [f"for {name}={solved}, not {asked}" for name, asked, solved in counts if asked > solved]
    if not reasons or plan.dtype.itemsize > constraint.get("itemsize", plan.dtype.itemsize):
        arguments["dtype"] = str(plan.dtype)
        reasons.append(f"for a smaller dtype than {plan.dtype}, or for other capacities")
    again = ", ".join(f"{name}={value}" for name, value in arguments.items())
    raise BudgetError(
        f"the plan was solved for at most {limit:,} bytes of KV cache, and {plan.kv_bytes:,} would be allocated: it "
        f"was solved {', and '.join(reasons)}. Solve it again with {again}, or allow it with over_limit=True"
    )
