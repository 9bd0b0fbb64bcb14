"""Roles of nodes: found by what a pass said of a node, whatever nodes are called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

import xkv_fx
from xkv_fx.errors import PassError
from xkv_fx.passes.tools.roles import find_role, give_role, nodes_by_role, role_of, with_role


class Doubled(nn.Module):
    def forward(self, length: Tensor) -> Tensor:
        return length * 2


def test_a_role_is_no_name() -> None:
    graph = symbolic_trace(Doubled()).graph
    named, product, *_ = graph.nodes
    assert find_role(graph, "length") is None
    with pytest.raises(PassError, match=r"no node of the graph has the role 'length'; the pass that gives it"):
        with_role(graph, "length")
    give_role(product, "length")
    assert with_role(graph, "length") is product
    assert role_of(named) is None
    assert nodes_by_role(graph) == {"length": product}
    assert [role_of(node) for node in copy.deepcopy(graph).nodes] == [role_of(node) for node in graph.nodes]


class Misleading(nn.Module):
    """A decoder whose weights have the names that passes give to nodes of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("length", torch.tensor([3, 1]))
        self.register_buffer("valid", torch.randn(11, 8))
        self.seen = nn.Parameter(torch.randn(8, 24) / 3)
        self.k_0 = nn.Parameter(torch.randn(8, 11))
        self.base = nn.Parameter(torch.randn(64, 8) / 3)

    def forward(self, valid: Tensor, seen: Tensor) -> Tensor:
        length: Any = self.length
        hidden = torch.nn.functional.embedding(valid, self.valid) + torch.nn.functional.embedding(seen, self.base)
        q, k, v = (hidden @ self.seen).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (hidden + attended.transpose(1, 2).flatten(2) * length[0]) @ self.k_0


def test_weights_and_inputs_with_the_names_of_roles_are_not_taken_for_them() -> None:
    """Prompts with padding, decode and a turn give what the module itself gives."""
    model = Misleading().eval()
    ids = torch.tensor([[0, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    example = (ids, torch.arange(6).expand(2, -1).contiguous())
    llm = xkv_fx.transform(model, xkv_fx.Budgets.full(1, 30), batch_size=2, backend="eager", example_inputs=example)
    text = llm.generate(ids, max_new_tokens=5, attention_mask=mask)
    for row, start in enumerate((1, 0)):
        alone = text[row : row + 1, start:]
        with torch.no_grad():
            logits = model(alone, torch.arange(alone.shape[1])[None])
        expected = logits[0, 5 - start : -1].argmax(-1)
        assert text[row, 6:].tolist() == expected.tolist()
