"""Writes examples/tour.ipynb: the whole way on a tiny model, with pictures.

`python examples/make_notebook.py` runs the cells below in order and stores what they print and draw, so that the
notebook can be read without being run. Jupyter opens it; nothing here needs it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "tour.ipynb"

CELLS: list[tuple[str, str]] = [
    (
        "markdown",
        """
# A tour of xkv_fx

A tiny model with random weights goes the whole way: measured, planned, transformed, run. What its layers attend to is
chance, so the pictures show what there is to see, not what a real model does.
""",
    ),
    (
        "code",
        """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import xkv_fx

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    eos_token_id=None,
    initializer_range=0.3,
)
model = LlamaForCausalLM(config).eval()
prompts = [torch.randint(1, 100, (1, 200)) for _ in range(3)]
""",
    ),
    (
        "markdown",
        """
## Measure

How much of its attention mass does each layer keep, at every capacity?
""",
    ),
    (
        "code",
        """
from xkv_fx.evaluation import pictures

profile = xkv_fx.profile(model, prompts)
pictures.draw_retention(profile, "retention.png")
""",
    ),
    (
        "markdown",
        """
## Plan

One capacity for each layer, for a quarter of the full cache, beside an even plan.
""",
    ),
    (
        "code",
        """
budgets = xkv_fx.solve(profile, fraction=0.25, multiple=4)
even = xkv_fx.solve(profile, fraction=0.25, multiple=4, allocator="uniform")
print(budgets.capacities, even.capacities)
print(budgets.kv_bytes(model), "bytes of K/V instead of", xkv_fx.Budgets.full(4, 200).kv_bytes(model))
pictures.draw_capacities({"xkv": budgets, "uniform": even}, "capacities.png")
""",
    ),
    (
        "markdown",
        """
## Transform and run

The capacities are constants in the graphs.
""",
    ),
    (
        "code",
        """
llm = xkv_fx.transform(model, budgets, backend="eager")
session = llm.new_session()
ids = prompts[0]
output = llm.generate(
    input_ids=ids,
    attention_mask=torch.ones_like(ids),
    past_key_values=session,
    max_new_tokens=40,
    do_sample=False,
)
print(llm.describe())
""",
    ),
    (
        "markdown",
        """
Which tokens does each layer hold by now?
""",
    ),
    (
        "code",
        """
pictures.draw_kept(session, "kept.png")
""",
    ),
    (
        "markdown",
        """
The graph of decode, as Python: the cached attention with its buffers, and the arithmetic that says which slot a token
takes.
""",
    ),
    (
        "code",
        """
print("\\n".join(line for line in llm.decode.code.splitlines() if "xkv" in line or "slot" in line)[:1500])
""",
    ),
]


def run(cells: list[tuple[str, str]]) -> dict[str, Any]:
    """The notebook, of Jupyter's format 4.5, with the outputs of its cells."""
    names: dict[str, Any] = {}
    written = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for number, (kind, source) in enumerate(cells):
            cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
            cell["source"] = source.strip().splitlines(keepends=True)
            if kind == "code":
                before, printed = set(Path().glob("*.png")), io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(source, f"cell {number}", "exec"), names)
                outputs: list[dict[str, Any]] = []
                if printed.getvalue():
                    outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue()})
                for picture in sorted(set(Path().glob("*.png")) - before):
                    data = {"image/png": base64.b64encode(picture.read_bytes()).decode()}
                    outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
                cell |= {"execution_count": None, "outputs": outputs}
            written.append(cell)
    language = {"name": "python", "version": sys.version.split()[0]}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": language}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": written}


def main() -> None:
    TARGET.write_text(json.dumps(run(CELLS), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
