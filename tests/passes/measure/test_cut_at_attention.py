"""A graph cut at its attentions: put together again it is the graph; what cannot be cut is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ready_models import captured
from tiny_models import random_ids
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.passes.analyses.find_attention import attention_sites
from xkv_fx.passes.measure.cut_at_attention import CutModel, cut_at_attention
from xkv_fx.passes.pipeline import run_pipeline
from xkv_fx.passes.prepare.clean_graph import CleanGraph

IDS = random_ids(1, 21, seed=2)
POSITIONS = torch.arange(21)[None]


def clean(family: str) -> GraphModule:
    return run_pipeline(captured(family, 2, 1).graph("prompt"), (CleanGraph(),)).module


def put_together(model: CutModel, ids: Tensor, positions: Tensor) -> Tensor:
    values: dict[str, Any] = dict(zip(model.inputs, (ids, positions), strict=True))
    for index, segment in enumerate(model.segments):
        inputs = [values[value.name] if value.size is None else value.size_of(ids.shape[1]) for value in segment.inputs]
        made = segment.module(*inputs)
        values |= {value.name: part for value, part in zip(segment.outputs, made, strict=True)}
        if index < len(model.sites):
            site = model.sites[index]
            q, k, v = (values[node.name] for node in (site.q, site.k, site.v))
            sinks = model.sink_logits.get(index)
            values[site.node.name] = torch.ops.xkv.attention(
                q, k, v, site.layer, site.form.scale, site.form.sliding_window, site.form.softcap, sinks
            )
    logits: Tensor = values[model.logits]
    return logits


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_put_together_it_is_the_graph(family: str) -> None:
    module = clean(family)
    model = cut_at_attention(module)
    with torch.no_grad():
        assert torch.equal(put_together(model, IDS, POSITIONS), module(IDS, POSITIONS))


def test_segments_share_the_weights_and_the_graph_is_left_alone() -> None:
    module = clean("llama")
    before = str(module.graph)
    model = cut_at_attention(module)
    assert str(module.graph) == before
    weights = {id(weight) for weight in module.parameters()}
    assert all(id(weight) in weights for segment in model.segments for weight in segment.module.parameters())


def test_what_later_segments_need_is_what_they_take() -> None:
    model = cut_at_attention(clean("llama"))
    for index in range(len(model.segments)):
        taken = {value.name for segment in model.segments[index:] for value in segment.inputs}
        assert model.needed_from[index] == taken


def test_a_value_of_token_pairs_cannot_cross() -> None:
    module = clean("llama")
    first, second = attention_sites(module)
    with module.graph.inserting_before(first.node):
        pairs = module.graph.call_function(torch.matmul, (first.q, first.q))
        with enable_python_dispatcher():  # without it, older torch settles on the length, for all who share the model
            pairs.meta["val"] = torch.matmul(first.q.meta["val"], first.q.meta["val"].transpose(-1, -2))
    with module.graph.inserting_before(second.node):
        mixed = module.graph.call_function(torch.matmul, (pairs, second.q))
        mixed.meta["val"] = second.q.meta["val"]
    second.node.replace_input_with(second.q, mixed)
    with pytest.raises(UnsupportedModelError, match="does not belong to single tokens"):
        cut_at_attention(module)


def test_an_argument_that_is_not_known_is_refused() -> None:
    module = clean("llama")
    site = attention_sites(module)[0]
    name = next(
        argument.name
        for argument in torch.ops.xkv.attention.default._schema.arguments
        if argument.name in ("slopes", "bias")
    )
    site.node.kwargs = {**site.node.kwargs, name: site.q}
    with pytest.raises(UnsupportedModelError, match=f"takes {name}, which cannot be cut out"):
        cut_at_attention(module)
