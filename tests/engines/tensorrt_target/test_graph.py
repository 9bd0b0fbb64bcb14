"""What TensorRT is given decodes as the transformed model does; no TensorRT is needed to show that."""

from __future__ import annotations

from typing import Any

import pytest
import ready_models
import torch
from exhaustive import exhaustive
from tiny_models import random_ids

from xkv_fx import Budgets, Policy
from xkv_fx.engines.tensorrt.build import returned_by
from xkv_fx.engines.tensorrt.graph import trace_for_tensorrt
from xkv_fx.engines.tensorrt.run import write_returned

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("family", "capacities"),
    [
        ("llama", (12, 16)),
        ("llama", ((12, 9), 16)),  # by KV head
        pytest.param("gemma2", (12, 16), marks=exhaustive),  # a soft cap, a sliding window
    ],
    ids=str,
)
def test_it_decodes_as_the_transformed_model_does(family: str, capacities: Any) -> None:
    llm = ready_models.transformed(Budgets(capacities), family=family)
    program = trace_for_tensorrt(llm.decode, llm.program.plan)
    targets = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert targets.count(aten.index_copy_.default) == 2 * len(llm.program.plan.caches)
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


@pytest.mark.parametrize(
    ("rows", "family", "policy"),
    [
        (2, "llama", Policy()),
        (1, "llama", Policy(eviction="scored", sinks=1)),
        pytest.param(2, "gemma2", Policy(eviction="scored", sinks=1), marks=exhaustive),
        pytest.param(2, "mistral", Policy(), marks=exhaustive),
    ],
)
def test_where_each_row_or_head_has_a_slot_of_its_own_the_caller_writes(rows: int, family: str, policy: Policy) -> None:
    llm = ready_models.transformed(Budgets((12, 16), policy), rows=rows, family=family)
    program = trace_for_tensorrt(llm.decode, llm.program.plan)
    assert not program.graph_signature.user_inputs_to_mutate
    plan, ours, theirs = llm.program.plan, llm.new_session().session, llm.new_session().session
    decode = program.module()
    valid = torch.ones(rows, 9, dtype=torch.bool)
    valid[-1, :4] = False  # of rows of unequal length each is elsewhere in its slots
    for session in (ours, theirs):
        session.feed(random_ids(rows, 9), valid=valid)
    state = dict(zip(plan.names(), theirs.state.tensors, strict=True))
    for tokens in random_ids(rows, 14, seed=1).T:
        expected = ours.step(tokens[:, None])
        logits, *returned = decode(tokens[:, None], state["seen"][:, None].clone(), *state.values())
        parts = returned_by(plan)
        for part, tensor in zip(parts, returned, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (part.shape, part.dtype)
        write_returned(plan, state, dict(zip([part.name for part in parts], returned, strict=True)))
        state["seen"] += 1
        assert torch.allclose(logits, expected, atol=1e-5)
    for one, other in zip(ours.state.tensors, theirs.state.tensors, strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-6)
