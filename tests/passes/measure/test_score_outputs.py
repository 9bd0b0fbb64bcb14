"""The score graph: every layer's scores, and nothing that no score needs."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import pytest
import torch
from batches import padded, positions_of
from by_hand import attention_weights, snapkv_scores
from graph_checks import assert_meta_is_true, attention_inputs
from ready_models import captured
from tiny_models import random_ids
from torch import Tensor
from torch.fx import GraphModule

from xkv_fx.errors import PassError
from xkv_fx.passes.analyses.find_attention import attention_sites
from xkv_fx.passes.measure.score_outputs import ScoreOutputs
from xkv_fx.passes.pipeline import profile_pipeline, run_pipeline
from xkv_fx.passes.tools.graph import calls, output_node, placeholders
from xkv_fx.runtime.scorers import PromptView, Scorer, SnapKV

FAMILIES = [("llama", 3), ("gemma2", 2)]
DEFAULT = SnapKV()
LINEAR = 7  # of a layer: queries, keys, values, output, and three in the MLP
ROWS = [random_ids(1, length, seed=length) for length in (5, 21)]


@dataclasses.dataclass(frozen=True)
class ValueNorm:
    """A scorer that reads values."""

    paper: ClassVar[str] = ""
    looks_at_question: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True
    measures_attention: ClassVar[bool] = False

    def __call__(self, prompt: PromptView) -> Tensor:
        assert prompt.v is not None
        return prompt.v.float().norm(dim=-1)


@functools.cache
def score_graph(family: str = "llama", layers: int = 3, scorer: Scorer = DEFAULT) -> GraphModule:
    source = captured(family, layers).graph("prompt")
    return run_pipeline(source, profile_pipeline(scorer)).module


@functools.cache
def weights_by_hand(family: str, layers: int, row: int) -> list[Tensor]:
    module, ids = captured(family, layers).prompt, ROWS[row].expand(2, -1)
    inputs = attention_inputs(module, ids, torch.arange(ids.shape[1]).expand(2, -1))
    return [
        attention_weights(q[0], k[0], site.form.scale, site.form.sliding_window, site.form.softcap)
        for site, (q, k, _) in zip(attention_sites(module), inputs, strict=True)
    ]


def weights_of(graph: GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "get_attr"]


@pytest.mark.parametrize(("family", "layers"), FAMILIES)
@pytest.mark.parametrize("scorer", [DEFAULT, SnapKV(observation_window=3, kernel=1)], ids=["default", "other"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_the_scorers_by_hand(family: str, layers: int, scorer: SnapKV, side: str) -> None:
    ids, valid = padded(ROWS, side)
    graph = score_graph(family, layers, scorer)
    with torch.no_grad():
        outputs = graph(ids, positions_of(valid), valid)
    assert len(outputs) == layers
    for row, prompt in enumerate(ROWS):
        length = prompt.shape[1]
        for weights, scores in zip(weights_by_hand(family, layers, row), outputs, strict=True):
            assert scores.dtype == torch.float32
            assert scores.shape == (2, 2, ids.shape[1])
            expected = snapkv_scores(weights, 2, scorer.observation_window, scorer.kernel).float()
            torch.testing.assert_close(scores[row, :, :length], expected, atol=1e-5, rtol=0)
            assert (scores[row, :, length + scorer.kernel // 2 :] == 0).all(), "padding has no score"
    assert_meta_is_true(graph, ids, positions_of(valid), valid)


@pytest.mark.parametrize(("family", "layers"), FAMILIES)
def test_what_no_score_needs_is_gone(family: str, layers: int) -> None:
    graph = score_graph(family, layers)
    assert len(calls(graph, torch.ops.aten.linear.default)) == LINEAR * (layers - 1) + 2
    assert len(calls(graph, torch.ops.xkv.attention.default)) == layers - 1
    last = f"layers.{layers - 1}."
    for weight in weights_of(graph):
        assert "lm_head" not in weight
        if last in weight:
            assert "mlp" not in weight
            assert "v_proj" not in weight
            assert "o_proj" not in weight
    assert {weight.split(".")[-2] for weight in weights_of(graph) if f"{last}self_attn" in weight} == {
        "q_proj",
        "k_proj",
    }


def test_a_scorer_that_reads_values_gets_the_last_layers_too() -> None:
    graph = score_graph(scorer=ValueNorm())
    assert len(calls(graph, torch.ops.aten.linear.default)) == LINEAR * 2 + 3
    assert any("layers.2.self_attn.v_proj" in weight for weight in weights_of(graph))
    ids = random_ids(2, 6)
    positions = torch.arange(6).expand(2, -1)
    with torch.no_grad():
        outputs = graph(ids, positions, torch.ones_like(ids, dtype=torch.bool))
    for (_, _, v), scores in zip(attention_inputs(captured().prompt, ids, positions), outputs, strict=True):
        torch.testing.assert_close(scores, v.norm(dim=-1), atol=1e-5, rtol=0)


def test_record_and_signature() -> None:
    source = captured().graph("prompt")
    result = run_pipeline(source, profile_pipeline(SnapKV()))
    record = result.records[-1]
    assert (record.name, record.matched, record.changed) == ("score_outputs", 3, 3)
    assert list(placeholders(result.module.graph)) == ["input_ids", "position_ids", "valid"]
    names = [node.name for node in output_node(result.module.graph).args[0]]  # type: ignore[union-attr]
    assert names == ["scores_0", "scores_1", "scores_2"]


def test_needs_the_pass_that_counts_valid_tokens() -> None:
    with pytest.raises(PassError, match="no node of the graph has the role 'length'"):
        ScoreOutputs(SnapKV())(captured().graph("prompt"))
