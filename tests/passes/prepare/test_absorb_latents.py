"""Latents are cached where keys and values are proved to be made from them, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from latent_models import ABSORBED, HEADS, LEFT, NOPE, RANK, ROPE, VALUE, VOCABULARY, LatentDecoder

from xkv_fx.capture.captured import CapturedModel
from xkv_fx.capture.plain_module import capture_module
from xkv_fx.layers import LayerSpec
from xkv_fx.passes.prepare.expand_latents import ExpandLatents
from xkv_fx.passes.tools.graph import attribute, calls

IDS = torch.arange(24)[None] % VOCABULARY
KINDS = [*ABSORBED, *LEFT, "too_wide"]


@pytest.fixture(scope="module")
def decoder() -> LatentDecoder:
    return LatentDecoder().eval()


@pytest.fixture(scope="module")
def captured(decoder: LatentDecoder) -> CapturedModel:
    """Capture compares the graph with the module, and with itself when the prompt is fed in pieces."""
    return capture_module(decoder, (IDS, IDS), rows=2)


@pytest.mark.parametrize("kind", ABSORBED)
def test_the_latent_is_cached(captured: CapturedModel, kind: str) -> None:
    size = RANK + (0 if kind == "without_rotary" else ROPE)
    layer = captured.layers[KINDS.index(kind)]
    assert layer == LayerSpec(HEADS, 1, size, 0, 4)
    assert layer.slot_bytes() == 4 * size
    assert captured.facts.has_latents


@pytest.mark.parametrize("kind", [*LEFT, "too_wide"])
def test_what_is_not_proved_or_saves_nothing_is_left_as_it_is(captured: CapturedModel, kind: str) -> None:
    assert captured.layers[KINDS.index(kind)] == LayerSpec(HEADS, HEADS, NOPE + ROPE, VALUE, 4)


def test_weights_are_shared(decoder: LatentDecoder, captured: CapturedModel) -> None:
    """Those that were absorbed too."""
    weights = {parameter.data_ptr() for parameter in decoder.parameters()}
    for graph in (captured.prompt, captured.token):
        assert graph is not None
        products = calls(graph, torch.ops.aten.bmm.default)
        assert len(products) == 2 * len(ABSORBED)
        for product in products:
            source = product.args[1]
            while source.op != "get_attr":
                source = source.args[0]
            assert attribute(graph, source.target).data_ptr() in weights


def test_prompts_attend_over_their_heads_again(decoder: LatentDecoder, captured: CapturedModel) -> None:
    """All but those whose rotary part is missing, which stay over latents."""
    module = captured.graph("prompt")
    record = ExpandLatents()(module)
    assert (record.matched, record.changed) == (len(ABSORBED), len(ABSORBED) - 1)
    ids = torch.randint(VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(30).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(module(ids, positions), decoder(ids, positions))
