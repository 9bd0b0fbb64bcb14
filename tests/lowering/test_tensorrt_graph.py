"""What TensorRT is given decodes as the transformed model does; no TensorRT is needed to show that."""

from __future__ import annotations

import pytest
import ready_models
import torch
from exhaustive import exhaustive
from tiny_models import random_ids

import xkv_fx
from xkv_fx import Budgets, Policy
from xkv_fx.lowering.tensorrt_graph import trace_for_tensorrt

aten = torch.ops.aten


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        pytest.param("gemma2", marks=exhaustive),  # a soft cap, a sliding window
    ],
)
def test_it_decodes_as_the_transformed_model_does(family: str) -> None:
    llm = ready_models.transformed(Budgets((12, 16)), family=family)
    program = trace_for_tensorrt(llm.decode)
    targets = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert targets.count(aten.index_copy_.default) == 4
    assert aten.add_.Tensor not in targets  # nothing but K/V is changed in place

    ours, theirs = (llm.new_session().session for _ in range(2))
    decode = program.module()
    for session in (ours, theirs):
        session.feed(random_ids(1, 9))
    seen = theirs.state["seen"]
    for token in random_ids(1, 10, seed=1)[0]:  # the seventh is the first to take another's slot
        expected = ours.step(token.view(1, 1))
        logits = decode(token.view(1, 1), seen[:, None].clone(), *theirs.state.tensors)
        seen += 1
        assert torch.allclose(logits, expected, atol=1e-5)
    for one, other in zip(ours.state.tensors, theirs.state.tensors, strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_updated_in_place_is_refused() -> None:
    with pytest.raises(xkv_fx.BackendError, match=r"one row only.* for 2"):
        trace_for_tensorrt(ready_models.full(2).decode)
    scored = ready_models.transformed(Budgets((12, 16), Policy(eviction="scored", sinks=1)))
    with pytest.raises(xkv_fx.BackendError, match="a slot of its own"):
        trace_for_tensorrt(scored.decode)
