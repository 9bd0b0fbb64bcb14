"""Pictures: what a session keeps, plans, retention curves, and what plans are worth."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xkv_fx.errors import XkvError
from xkv_fx.evaluation.quality.results import CONTINUATION_TASK, FULL, Evaluation, Row
from xkv_fx.planning.data.profile_data import Profile
from xkv_fx.planning.fit.data import Fit
from xkv_fx.public_budgets import Budgets


def new_figure(width: float, height: float) -> Any:
    """An empty figure of a given size in inches.

    Raises:
        XkvError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise XkvError("pictures need matplotlib; install xkv-fx[plots]") from error
    return Figure(figsize=(width, height), layout="constrained")


def kept_share(session: Any, row: int = 0) -> Tensor:
    """Which tokens each layer keeps: float32 `[layers, tokens seen]`, the share of its KV heads that hold the token.

    Args:
        session: from `llm.new_session()`.
        row: of the batch.
    """
    tokens = int(session.tokens_seen[row])
    layers = len(session.session.program.plan.layers)
    shares = torch.zeros(layers, tokens)
    for layer in range(layers):
        kept = session.kept_positions(layer)[row]
        for head in kept:
            shares[layer, head[head >= 0]] += 1 / len(kept)
    return shares


def draw_kept(session: Any, path: str | os.PathLike[str], row: int = 0) -> None:
    """Write a picture, layers by positions: the darker, the more of a layer's KV heads keep that token.

    Args:
        session: from `llm.new_session()`, with tokens in it.
        path: where to write; the extension decides the format (.png, .svg, .pdf).

    Raises:
        XkvError: matplotlib is missing, or the session is empty.
    """
    shares = kept_share(session, row)
    if shares.shape[1] == 0:
        raise XkvError("the session has seen no tokens yet; there is nothing to draw")
    figure = new_figure(10, 1.2 + 0.14 * len(shares))
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(
        xlabel="position of the token", ylabel="layer", title="Tokens kept, by the share of KV heads that keep them"
    )
    figure.savefig(path, dpi=120)


def draw_evaluation(
    evaluation: Evaluation, folder: str | os.PathLike[str], profiles: Sequence[Profile] = ()
) -> tuple[Path, ...]:
    """Write quality over bytes, capacities of each layer, those of KV heads for each plan that has some, and for a
    profile its retention curves, as PNG.

    Raises:
        XkvError: matplotlib is missing.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = [target / "quality.png", target / "capacities.png"]
    draw_quality(evaluation, written[0])
    draw_capacities({f"{plan.name}, {plan.size}": plan.budgets for plan in evaluation.plans}, written[1])
    for plan in evaluation.plans:
        if plan.budgets.by_head:
            written.append(target / f"heads-{len(written) - 1}.png")
            draw_heads(plan.budgets, written[-1])
    for index, profile in enumerate(profiles):
        written.append(target / ("retention.png" if index == 0 else f"retention-{index + 1}.png"))
        draw_retention(profile, written[-1])
    return tuple(written)


def draw_quality(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """A panel for each task and form: the mean score, or KL, over the bytes that keys and values take."""
    panels = list(dict.fromkeys((row.task, row.form) for row in evaluation.rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure(4.4 * columns, 3.2 * lines)
    every = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (task, form) in zip(every, panels, strict=False):
        rows = [row for row in evaluation.rows if (row.task, row.form) == (task, form)]
        for name in dict.fromkeys(evaluation.name_of(row) for row in rows):
            _draw_line(axes, name, [row for row in rows if evaluation.name_of(row) == name])
        asked = "" if task == CONTINUATION_TASK else f", {form}"
        axes.set(title=f"{task}{asked}", xlabel="KV MB", ylabel="KL" if task == CONTINUATION_TASK else "answers found")
        if task == CONTINUATION_TASK:
            axes.set_yscale("symlog", linthresh=1e-3)
        else:
            axes.set_ylim(-0.03, 1.03)
    for axes in every[len(panels) :]:
        axes.remove()
    every[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _draw_line(axes: Any, name: str, rows: Sequence[Row]) -> None:
    rows = sorted(rows, key=lambda row: row.kv_bytes)
    means = [row.mean for row in rows]
    if name == FULL:
        axes.axhline(means[0], color="grey", linestyle="--", label=name)
    else:
        axes.plot([row.kv_bytes / 1e6 for row in rows], means, marker="o", label=name)


def draw_fit(found: Fit, path: str | os.PathLike[str]) -> None:
    """Quality over bytes: every candidate, the curve of plans made as the chosen one was, and the chosen one."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    curve = found.report.curve
    axes.plot([size / 1e6 for size, _ in curve], [kl for _, kl in curve], color="grey", label="made as the chosen one")
    for candidate in found.candidates[1:]:
        axes.scatter(candidate.kv_bytes / 1e6, candidate.mean_kl, s=18, label=candidate.name)
    chosen = found.chosen
    axes.scatter(chosen.kv_bytes / 1e6, chosen.mean_kl, s=90, marker="*", color="black", label=f"chosen: {chosen.name}")
    axes.set(xlabel="KV MB", ylabel="KL to the full cache on held-out prompts, nats")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def draw_capacities(plans: Mapping[str, Budgets], path: str | os.PathLike[str]) -> None:
    """The capacity of each layer, a step line a plan; of a layer planned by KV head the mean over its heads, in a band
    from its smallest to its largest one."""
    figure = new_figure(9, 4)
    axes = figure.add_subplot()
    for name, budgets in plans.items():
        layers = range(len(budgets.capacities))
        (line,) = axes.step(layers, budgets.layer_means, where="mid", label=name)
        if budgets.by_head:
            each = [c if isinstance(c, tuple) else (c,) for c in budgets.capacities]
            lowest, highest = (list(map(pick, each)) for pick in (min, max))
            axes.fill_between(layers, lowest, highest, step="mid", alpha=0.2, color=line.get_color())
    axes.set(xlabel="layer", ylabel="capacity (slots per KV head)", yscale="log")
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=120)


def draw_heads(budgets: Budgets, path: str | os.PathLike[str]) -> None:
    """Layers by KV heads of one plan: the darker, the larger the head's capacity."""
    columns = max(len(c) if isinstance(c, tuple) else 1 for c in budgets.capacities)
    capacities = np.full((len(budgets.capacities), columns), np.nan)
    for layer, capacity in enumerate(budgets.capacities):
        capacities[layer, : len(capacity) if isinstance(capacity, tuple) else columns] = capacity
    figure = new_figure(2.4 + 0.3 * columns, 1.2 + 0.14 * len(capacities))
    axes = figure.add_subplot()
    drawn = axes.imshow(capacities, aspect="auto", cmap="Blues", norm="log", interpolation="nearest")
    figure.colorbar(drawn, label="capacity (slots)")
    axes.set(xlabel="KV head", ylabel="layer", xticks=range(columns))
    figure.savefig(path, dpi=120)


def draw_retention(profile: Profile, path: str | os.PathLike[str]) -> None:
    """The mean retention curve of each layer, over the share of tokens that it keeps."""
    context = profile.context_default
    curves = profile.mean_curve(context)
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    share = np.arange(context + 1) / context
    for layer, curve in enumerate(curves):
        axes.plot(share, curve, color=(layer / max(1, len(curves) - 1), 0.3, 0.6), linewidth=0.9)
    axes.set(xlabel="share of the tokens kept", ylabel="share of attention mass kept", ylim=(0, 1.02))
    axes.set_title("Retention of each layer, first ones blue, last ones red")
    figure.savefig(path, dpi=120)
