"""Attention nodes are found in execution order, with everything that decides what their layers cache."""

from __future__ import annotations

import pytest
import torch
from graph_checks import export
from ready_models import captured
from tiny_models import WINDOW

from xkv_fx.errors import UnsupportedModelError
from xkv_fx.layers import LayerSpec
from xkv_fx.passes.analyses.find_attention import attention_sites
from xkv_fx.passes.tools.graph import calls

attention = torch.ops.xkv.attention.default


@pytest.mark.parametrize("kind", ["prompt", "token"])
def test_sites_of_llama(kind: str) -> None:
    module = captured().graph(kind)  # type: ignore[arg-type]
    sites = attention_sites(module)
    assert [site.node for site in sites] == calls(module, attention)
    assert [site.index for site in sites] == [site.layer for site in sites] == [0, 1, 2]
    for site in sites:
        assert (site.q, site.k, site.v) == site.node.args[:3]
        assert site.form.scale == pytest.approx(8**-0.5)
        assert (site.form.sliding_window, site.form.softcap, site.form.sink_logits) == (None, None, None)
        assert site.spec == LayerSpec(query_heads=4, kv_heads=2, key_dim=8, value_dim=8, itemsize=4)
        assert all(type(number) is int for number in (site.spec.query_heads, site.spec.key_dim, site.spec.value_dim))


def test_sites_carry_soft_cap_and_sliding_window() -> None:
    first, second = attention_sites(captured("gemma2", 2).graph("prompt"))
    assert (first.form.sliding_window, second.form.sliding_window) == (WINDOW, None)
    assert first.spec.sliding_window == WINDOW
    assert first.form.softcap == second.form.softcap == 2.0


def test_keys_and_values_may_differ_in_size() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        transposed = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return attention(*transposed, 7, 0.5, 4)  # type: ignore[no-any-return]

    module = export(attend, *(torch.randn(1, 6, heads, dim) for heads, dim in ((6, 4), (3, 4), (3, 5))))
    (site,) = attention_sites(module)
    assert (site.index, site.layer) == (0, 7)
    assert site.spec == LayerSpec(6, 3, 4, 5, 4, sliding_window=4)


def test_a_graph_without_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no attention was found"):
        attention_sites(export(lambda x: x + 1, torch.randn(1, 4)))


def test_a_layer_that_attends_twice_has_two_sites() -> None:
    module = captured().graph("prompt")
    first, _, third = calls(module, attention)
    third.args = (*third.args[:3], first.args[3], *third.args[4:])
    assert [(site.index, site.layer) for site in attention_sites(module)] == [(0, 0), (1, 1), (2, 0)]
