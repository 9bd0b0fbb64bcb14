"""How plans, profiles and calibrations are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

import xkv_fx
from xkv_fx.cli.common import console, show
from xkv_fx.formats import formats_of_heads, is_by_head, pair_name
from xkv_fx.sizes import as_text

if TYPE_CHECKING:
    from xkv_fx.planning.data.calibration_data import Calibration
    from xkv_fx.planning.data.profile_data import Profile


def summary_of(measured: Profile | Calibration) -> dict[str, Any]:
    return {
        "model": measured.model,
        "layers": len(measured.model_layers),
        **({} if measured.heads is None else {"kv_heads": len(measured.layers)}),
        "prompts": len(measured.lengths),
        "longest": measured.context_default,
    }


def show_measured(measured: Profile | Calibration, as_json: bool, path: Path) -> None:
    if as_json:
        kind = type(measured).__name__.lower()
        print(json.dumps({kind: str(path), **summary_of(measured), "policy": measured.policy.to_dict()}))
    else:
        console.print(f"{path}\n{measured}", markup=False, highlight=False, soft_wrap=True)


def mean_keys_in_words(budgets: xkv_fx.Budgets) -> str | None:
    """Of which layers the plan has mean keys; None without any."""
    if budgets.mean_keys is None:
        return None
    count = sum(mean is not None for mean in budgets.mean_keys)
    return f"of {count} of {len(budgets.mean_keys)} layers, taken off keys in fewer bits"


def show_plan(budgets: xkv_fx.Budgets, as_json: bool, path: Path) -> None:
    made = budgets.provenance
    result = {
        "budgets": str(path),
        "capacities": list(budgets.capacities),
        "total_tokens": budgets.total_tokens,
        "formats": budgets.formats,
        "mean_keys": mean_keys_in_words(budgets),
        "policy": budgets.policy.to_dict(),
        "provenance": made.to_dict(),
    }
    if as_json:
        print(json.dumps(result))
        return
    known = {name: value for name, value in made.to_dict().items() if name not in ("full_kv_bytes", "sliding_windows")}
    if made.kv_bytes is not None:
        known["kv_bytes"] = f"{as_text(made.kv_bytes)} a row"
        if made.full_kv_bytes is not None and made.context is not None:
            full = f"the {as_text(made.full_kv_bytes)} of a full cache of {made.context:,} tokens"
            known["kv_bytes"] += f", {made.share:.1%} of {full}"
    constants = {} if budgets.mean_keys is None else {"mean_keys": mean_keys_in_words(budgets)}
    show(
        {"budgets": path, "total_tokens": budgets.total_tokens, **constants, **budgets.policy.to_dict(), **known}, False
    )
    by_head = ("KV head",) if budgets.by_head else ()
    table = Table("layer", *by_head, "capacity", "recent", *(() if budgets.formats is None else ("formats",)))
    layers = zip(budgets.capacities, budgets.recent, budgets.layer_formats, strict=True)
    for layer, (capacity, recent, formats) in enumerate(layers):
        heads = len(capacity) if isinstance(capacity, tuple) else len(formats) if is_by_head(formats) else 1
        each = zip(_of_heads(capacity, heads), _of_heads(recent, heads), formats_of_heads(formats, heads), strict=True)
        for head, (slots, newest, pair) in enumerate(each):
            place = () if not by_head else ("all",) if heads == 1 else (str(head),)
            stored = () if budgets.formats is None else (pair_name(pair),)
            table.add_row(str(layer), *place, str(slots), str(newest), *stored)
    console.print(table)


def _of_heads(planned: int | tuple[int, ...], heads: int) -> tuple[int, ...]:
    return planned if isinstance(planned, tuple) else (planned,) * heads
