"""Prefill's logits are those of each row's last valid token, and no others are computed."""

from __future__ import annotations

import pytest
import torch
from batches import padded, positions_of
from graph_checks import assert_meta_is_true
from ready_models import captured, model
from tiny_models import VOCABULARY, random_ids
from torch import Tensor
from torch.fx import GraphModule, Node

from xkv_fx.errors import PassError
from xkv_fx.passes.base import PassRecord
from xkv_fx.passes.pipeline import run_pipeline
from xkv_fx.passes.prepare.clean_graph import CleanGraph
from xkv_fx.passes.prepare.compact_padding import CompactPadding
from xkv_fx.passes.prepare.select_last_logits import SelectLastLogits
from xkv_fx.passes.tools.graph import at_end, calls, output_node
from xkv_fx.passes.tools.inline import inline

LAYERS = {"llama": 3, "gemma2": 2}
ROWS = [random_ids(1, length, seed=length) for length in (4, 11)]


def compacted(family: str) -> GraphModule:
    source = captured(family, LAYERS[family]).graph("prompt")
    return run_pipeline(source, (CleanGraph(), CompactPadding(restore_order=False))).module


def check(graph: GraphModule, family: str, change: object = None) -> None:
    for side in ("left", "right"):
        ids, valid = padded(ROWS, side)
        with torch.no_grad():
            logits = graph(ids, positions_of(valid), valid)
            for index, row in enumerate(ROWS):
                expected = model(family, LAYERS[family])(row, use_cache=False).logits[0, -1:]
                if change is not None:
                    expected = expected.softmax(-1)
                torch.testing.assert_close(logits[index], expected, atol=1e-4, rtol=0)
        assert_meta_is_true(graph, ids, positions_of(valid), valid)


def projection(graph: GraphModule) -> Node:
    (node,) = (node for node in calls(graph, torch.ops.aten.linear.default) if "lm_head" in str(node.args[1]))
    return node


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # Gemma 2 caps its logits behind the projection
def test_only_the_last_valid_token_is_projected(family: str) -> None:
    graph = compacted(family)
    record = SelectLastLogits()(graph)
    assert record == PassRecord("select_last_logits", 1, 1)
    assert projection(graph).meta["val"].shape == (2, 1, VOCABULARY)
    result = output_node(graph.graph).args[0]
    assert isinstance(result, Node)
    assert result.meta["val"].shape == (2, 1, VOCABULARY)
    check(graph, family)


def softmax_of(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def test_behind_another_op_all_logits_are_computed_and_the_record_says_so() -> None:
    graph = compacted("llama")
    output = output_node(graph.graph)
    with at_end(graph.graph):
        output.args = (inline(graph.graph, softmax_of, output.args[0]),)  # type: ignore[arg-type]
    record = SelectLastLogits()(graph)
    assert "all logits are computed" in record.note
    assert projection(graph).meta["val"].shape[1] != 1
    check(graph, "llama", softmax_of)


def test_needs_the_pass_that_counts_valid_tokens() -> None:
    graph = captured().graph("prompt")
    with pytest.raises(PassError, match="no node of the graph has the role 'length'"):
        SelectLastLogits()(graph)
