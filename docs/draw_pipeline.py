"""The way from prompts to a cache of fixed size as one picture, for README.md.

`python docs/draw_pipeline.py` calibrates SmolLM2 on stretches of the Python documentation, solves for a share of the
full cache, transforms the model, feeds it a growing text, and draws what came out to `docs/pipeline.svg`. It takes a
few minutes. What was calibrated is kept in `out/pipeline.parts`, so that drawing it again is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

import xkv_fx
from xkv_fx.evaluation.texts import cut_prompts, documentation
from xkv_fx.hf.models import load_model
from xkv_fx.passes.tools.graph import arguments

ROOT = Path(__file__).resolve().parents[1]
FRACTION = 0.384
LAYERS_SHOWN = 8
OURS, OTHERS = "#2f6db3", "#8a8a8a"


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What the picture shows.

    Attributes:
        calibration: the curves.
        budgets: the plan solved from them.
        graph_lines: what the prefill graph says of the first layers' caches.
        held: tokens seen and bytes of K/V held, as one session was fed.
        full: bytes of a full cache for the same numbers of tokens.
    """

    calibration: xkv_fx.Calibration
    budgets: xkv_fx.Budgets
    graph_lines: Sequence[str]
    held: Sequence[tuple[int, int]]
    full: Sequence[int]


def measure(model: Any, prompts: Sequence[Tensor], parts: Path | None) -> Drawn:
    """Go the whole way with a model, and write down what there is to see."""
    policy = xkv_fx.Policy(eviction="ring")
    calibration = xkv_fx.calibrate(model, prompts, policy=policy, resume=parts)
    budgets = xkv_fx.solve(calibration, fraction=FRACTION)
    llm = xkv_fx.transform(model, budgets, backend="eager")
    session, text = llm.new_session(), torch.cat(tuple(prompts), 1)
    longest = min(2 * prompts[0].shape[1], text.shape[1])
    step = longest // 8
    held = [(0, session.kv_bytes)]
    for end in range(step, longest + 1, step):
        ids = text[:, :end]
        with torch.no_grad():
            llm(ids[:, held[-1][0] :], attention_mask=torch.ones_like(ids), past_key_values=session)
        held.append((int(session.tokens_seen[0]), session.kv_bytes))
    layers = len(budgets.capacities)
    full = [0, *(xkv_fx.Budgets.full(layers, tokens).kv_bytes(model) for tokens, _ in held[1:])]
    return Drawn(calibration, budgets, graph_lines(llm), held, full)


def graph_lines(llm: Any) -> list[str]:
    """The ops of the prefill graph that write the survivors into the caches, with the numbers they hold."""
    lines = []
    for node in llm.prefill.graph.nodes:
        given = arguments(node) if "xkv" in str(node.target) else {}
        if "capacity" in given:
            caches = ", ".join(source.name for source in node.all_input_nodes if source.name.startswith(("k_", "v_")))
            lines.append(f"xkv.keep(..., {caches}, capacity={given['capacity']})")
    if len(lines) != len(llm.budgets.capacities):
        raise SystemExit(f"the prefill graph names {len(lines)} capacities of {len(llm.budgets.capacities)}")
    return lines


def draw(drawn: Drawn, path: Path) -> None:
    """Write the picture; the ending of `path` decides the format."""
    matplotlib.rcParams["svg.hashsalt"] = "xkv_fx"  # the same picture is the same file
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    curves, plan, graph, memory = figure.subplots(1, 4, width_ratios=(3, 3.4, 3.2, 3))
    _draw_curves(curves, drawn.calibration)
    _draw_plan(plan, drawn)
    _draw_graph(graph, drawn.graph_lines)
    _draw_memory(memory, drawn)
    for axes in (curves, plan, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_curves(axes: Any, calibration: xkv_fx.Calibration) -> None:
    mean = calibration.kl.mean(0)
    for layer, values in enumerate(mean):
        shade = layer / max(1, len(mean) - 1)
        axes.plot(calibration.grid, values, color=(0.75 * shade, 0.35, 0.75 * (1 - shade)), linewidth=0.9)
    axes.set(
        yscale="log",
        xlabel="share of the tokens that one layer keeps\n(first layers blue, last ones brown)",
        ylabel="KL to the full cache",
    )
    axes.set_title("1  measure: what does each layer\nlose by keeping less?", fontsize=10)


def _draw_plan(axes: Any, drawn: Drawn) -> None:
    capacities, context = drawn.budgets.capacities, drawn.calibration.context_default
    axes.bar(range(len(capacities)), context, color="#e4e4e4", width=0.8, label="full cache")
    axes.bar(range(len(capacities)), capacities, color=OURS, width=0.8, label=f"plan, {FRACTION:.1%} of it")
    axes.axhline(
        sum(capacities) / len(capacities), color=OTHERS, linestyle="--", linewidth=1, label="uniform, same bytes"
    )
    axes.set(xlabel="layer", ylabel="capacity: tokens kept", ylim=(0, 1.3 * context))
    axes.set_title("2  solve: a capacity for each layer,\nahead of time", fontsize=10)
    axes.legend(fontsize=8, loc="upper right", ncols=2, frameon=False, handlelength=1.3, columnspacing=1)


def _draw_graph(axes: Any, lines: Sequence[str]) -> None:
    shown = [*lines[:LAYERS_SHOWN], f"... {len(lines)} layers"]
    axes.set_axis_off()
    axes.set_title("3  compile: the capacities are\nconstants in the graph", fontsize=10)
    for number, line in enumerate(shown):
        axes.text(0, 0.93 - number * 0.105, line, family="monospace", fontsize=7.2, transform=axes.transAxes)


def _draw_memory(axes: Any, drawn: Drawn) -> None:
    tokens = [seen for seen, _ in drawn.held]
    axes.plot(tokens, [count / 1e6 for count in drawn.full], color=OTHERS, linestyle="--", label="full cache")
    axes.plot(tokens, [count / 1e6 for _, count in drawn.held], color=OURS, linewidth=2.5, label="the plan's buffers")
    axes.set(xlabel="tokens seen", ylabel="K/V of one row, MB", xlim=(0, tokens[-1]), ylim=0)
    axes.set_title("4  run: memory is fixed\nbefore the first token", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model folder, a .gguf file or an alias")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="of each prompt")
    parser.add_argument("--parts", type=Path, default=ROOT / "out" / "pipeline.parts", help="what was measured so far")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pipeline.svg")
    options = parser.parse_args(given)
    model, tokenizer = load_model(options.model)
    prompts = cut_prompts(tokenizer, documentation(), options.prompts, options.tokens)
    draw(measure(model, prompts, options.parts), options.out)


if __name__ == "__main__":
    main()
