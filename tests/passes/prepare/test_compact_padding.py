"""Padding as an input: every row is computed as if it stood alone."""

from __future__ import annotations

import pytest
import torch
from batches import padded, positions_of
from graph_checks import assert_meta_is_true
from ready_models import captured, model
from tiny_models import random_ids
from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.passes.pipeline import run_pipeline
from xkv_fx.passes.prepare.clean_graph import CleanGraph
from xkv_fx.passes.prepare.compact_padding import CompactPadding
from xkv_fx.passes.tools.graph import placeholders
from xkv_fx.passes.tools.roles import LENGTH, with_role

LENGTHS = (4, 11)
ROWS = [random_ids(1, length, seed=length) for length in LENGTHS]


@pytest.fixture(scope="module", params=[True, False], ids=["in place", "in front"])
def restores(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def graph(restores: bool) -> GraphModule:
    source = captured().graph("prompt")
    return run_pipeline(source, (CleanGraph(), CompactPadding(restore_order=restores))).module


def alone(row: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(layers=3)(row, use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fill", [0, 17])
def test_rows_are_as_they_are_alone(graph: GraphModule, restores: bool, side: str, fill: int) -> None:
    ids, valid = padded(ROWS, side, fill)
    with torch.no_grad():
        logits = graph(ids, positions_of(valid), valid)
    for index, row in enumerate(ROWS):
        mine = logits[index, valid[index]] if restores else logits[index, : row.shape[1]]
        torch.testing.assert_close(mine, alone(row), atol=1e-4, rtol=0)


def test_padding_on_both_sides(graph: GraphModule, restores: bool) -> None:
    ids, valid = padded(ROWS, "right", width=12)
    ids, valid = ids.roll(1, dims=1), valid.roll(1, dims=1)
    with torch.no_grad():
        logits = graph(ids, positions_of(valid), valid)
    for index, row in enumerate(ROWS):
        mine = logits[index, valid[index]] if restores else logits[index, : row.shape[1]]
        torch.testing.assert_close(mine, alone(row), atol=1e-4, rtol=0)


def test_without_padding_nothing_moves(graph: GraphModule) -> None:
    ids, positions = random_ids(2, 6), torch.arange(6).expand(2, -1)
    with torch.no_grad():
        logits = graph(ids, positions, torch.ones_like(ids, dtype=torch.bool))
        torch.testing.assert_close(logits, model(layers=3)(ids, use_cache=False).logits, atol=1e-4, rtol=0)


def test_positions_move_with_their_tokens(graph: GraphModule, restores: bool) -> None:
    """Positions are the caller's; they need not count from 0."""
    ids, valid = padded(ROWS, "left")
    positions = positions_of(valid) + 5
    with torch.no_grad():
        logits = graph(ids, positions, valid)
        row = model(layers=3)(ROWS[0], position_ids=torch.arange(4)[None] + 5, use_cache=False).logits[0]
    mine = logits[0, valid[0]] if restores else logits[0, :4]
    torch.testing.assert_close(mine, row, atol=1e-4, rtol=0)


def test_inputs_and_fake_values(graph: GraphModule) -> None:
    assert list(placeholders(graph.graph)) == ["input_ids", "position_ids", "valid"]
    assert with_role(graph.graph, LENGTH).meta["val"].shape == (2,)
    ids, valid = padded(ROWS, "left")
    assert_meta_is_true(graph, ids, positions_of(valid), valid)
