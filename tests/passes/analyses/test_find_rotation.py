"""What positions do to queries: found in the graph, against the model's own queries at chosen positions."""

from __future__ import annotations

import functools
from typing import Any

import plain_models
import pytest
import torch
from ready_models import captured, model
from tiny_models import FAMILIES, build, random_ids
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StableLmConfig,
    StableLmForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from xkv_fx.capture.captured import CapturedModel
from xkv_fx.capture.plain_module import capture_module
from xkv_fx.errors import UnsupportedModelError
from xkv_fx.hf.capture import capture
from xkv_fx.passes.analyses.find_attention import attention_sites
from xkv_fx.passes.analyses.find_rotation import QueryRotation, find_rotations
from xkv_fx.passes.pipeline import run_pipeline
from xkv_fx.passes.prepare.clean_graph import CleanGraph
from xkv_fx.passes.prepare.compact_padding import CompactPadding
from xkv_fx.passes.tools.dependence import Evaluation
from xkv_fx.passes.tools.graph import placeholders

ROWS, TOKENS, COMING = 2, 5, 6
IDS = random_ids(ROWS, TOKENS, seed=3)
NEWEST = torch.tensor([17, 4])
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 10000.0}
_SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 1, "max_position_embeddings": 400,
}  # fmt: skip
_GPT_SIZES = {"vocab_size": 61, "n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 24}


def tiny(family: str) -> PreTrainedModel:
    if family == "yarn":
        return build(LlamaForCausalLM, LlamaConfig(**_SIZES, head_dim=8, rope_parameters=YARN), 0)
    if family == "partial":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        return build(StableLmForCausalLM, StableLmConfig(**_SIZES, rope_parameters=rope), 0)
    if family == "interleaved":
        return build(GPTJForCausalLM, GPTJConfig(**_GPT_SIZES, rotary_dim=4), 0)
    return build(GPT2LMHeadModel, GPT2Config(**_GPT_SIZES), 0)


@functools.cache
def source_of(family: str) -> tuple[PreTrainedModel, CapturedModel]:
    if family in FAMILIES:
        return model(family, 2), captured(family, 2, ROWS)
    source = tiny(family)
    return source, capture(source, rows=ROWS, check=False, decode=False)


def found_in(source: CapturedModel, count: int = COMING) -> tuple[GraphModule, tuple[QueryRotation, ...]]:
    module = run_pipeline(source.graph("prompt"), (CleanGraph(), CompactPadding(False))).module
    return module, find_rotations(module, attention_sites(module), count)


def unrotated(module: GraphModule, rotations: tuple[QueryRotation, ...], positions: Tensor) -> list[Tensor]:
    values = Evaluation(module, dict(zip(placeholders(module.graph).values(), given(positions), strict=True)))
    return [rotation.arrange(values.value(rotation.source)) for rotation in rotations]


def given(positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return IDS, positions, torch.ones_like(IDS, dtype=torch.bool)


def queries_at(model: PreTrainedModel, positions: Tensor) -> list[Tensor]:
    """Each layer's queries as transformers' attention gets them, with these position ids."""
    seen: list[Tensor] = []

    def recording(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(q)
        return sdpa_attention_forward(module, q, k, v, *args, **kwargs)

    before = model.config._attn_implementation
    AttentionInterface.register("recording_queries", recording)
    model.set_attn_implementation("recording_queries")
    try:
        with torch.no_grad():
            model(IDS, position_ids=positions, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "yarn", "partial"])
def test_mean_rotation_turns_queries_as_the_model_does_on_average(family: str) -> None:
    """All tokens of a row at one position: then the hidden states are the same at every position, and what differs
    between the queries is the rotation."""
    model, source = source_of(family)
    module, rotations = found_in(source)
    kinds = 2 if family == "gemma3" else 1
    assert len({rotation.mean for rotation in rotations}) == kinds
    everywhere = [queries_at(model, (NEWEST[:, None] + step).expand(-1, TOKENS)) for step in range(1, COMING + 1)]
    before = unrotated(module, rotations, torch.zeros_like(IDS))
    for index, rotation in enumerate(rotations):
        assert rotation.mean is not None
        got = before[index] @ rotation.mean(NEWEST)[:, None]
        expected = torch.stack([queries[index] for queries in everywhere]).mean(0)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_table_of_positions_ends_before_the_coming_ones_do() -> None:
    """GPT-J looks its rotations up, in a table of 24. Of the first row all six to come are there, of the second two."""
    _, source = source_of("interleaved")
    _, rotations = found_in(source)
    mean = rotations[0].mean
    assert mean is not None
    got = mean(torch.tensor([17, 21]))

    def rotation(position: int) -> Tensor:
        rotated = torch.eye(8)
        for pair in range(2):
            angle = torch.tensor(position * 10000.0 ** (-pair / 2))
            cos, sin = angle.cos(), angle.sin()
            rotated[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = torch.stack((cos, sin, -sin, cos)).view(2, 2)
        return rotated

    torch.testing.assert_close(got[0], torch.stack([rotation(p) for p in range(18, 24)]).mean(0))
    torch.testing.assert_close(got[1], torch.stack([rotation(p) for p in (22, 23)]).mean(0))
    torch.testing.assert_close(mean(torch.tensor([23, 0]))[0], rotation(23))


def test_positions_in_the_hidden_state_are_no_rotation() -> None:
    _, source = source_of("gpt2")
    module, rotations = found_in(source)
    for rotation, site in zip(rotations, attention_sites(module), strict=True):
        assert rotation.mean is None
        assert rotation.source is site.q


@pytest.mark.parametrize("attend", [plain_models.sdpa, plain_models.rotary_counted], ids=lambda attend: attend.__name__)
def test_a_plain_module(attend: Any) -> None:
    """Learned positions alone, and with a rotation by positions that the module counts itself."""
    source = capture_module(plain_models.decoder(attend), plain_models.example(), rows=ROWS)
    _, rotations = found_in(source)
    assert all((rotation.mean is None) == (attend is plain_models.sdpa) for rotation in rotations)


# What is refused


def bent(x: Tensor, angle: Tensor) -> Tensor:
    return torch.tanh(x * angle.cos())


def shifted(x: Tensor, angle: Tensor) -> Tensor:
    return x + angle


def twice(x: Tensor, angle: Tensor) -> Tensor:
    return x * angle.cos() * angle.sin()


def normed(x: Tensor, angle: Tensor) -> Tensor:
    rotated = x * angle.cos()
    return rotated / rotated.norm(dim=-1, keepdim=True)


def normed_between(x: Tensor, angle: Tensor) -> Tensor:
    return normed(x, angle) * angle.sin()


def by_head(x: Tensor, angle: Tensor) -> Tensor:
    return x * (angle * torch.arange(x.shape[1])[:, None, None]).cos()


class Rotated(nn.Module):
    """One layer whose queries and keys are changed by `turn(x, angle)`, `angle` `[rows, 1, S, dim]`."""

    def __init__(self, turn: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turn = turn
        self.embed, self.qkv, self.head = nn.Embedding(61, 16), nn.Linear(16, 48), nn.Linear(16, 61)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        rows, tokens = input_ids.shape
        q, k, v = self.qkv(self.embed(input_ids)).view(rows, tokens, 6, 8).transpose(1, 2).chunk(3, 1)
        angle = (position_ids[..., None] * 0.3 / (1 + torch.arange(8)))[:, None]
        q, k = self.turn(q, angle), self.turn(k, angle)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits: Tensor = self.head(out.transpose(1, 2).reshape(rows, tokens, 16))
        return logits


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        (bent, "positions enter them in mul"),
        (shifted, "positions enter them in add"),
        (twice, "by something of their positions twice"),
        (normed, "positions enter them in mul"),
        (normed_between, "positions enter them in mul"),
        (by_head, "do not rotate each head's query by the same matrix"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_linear_map_of_each_head_is_refused(turn: Any, why: str) -> None:
    source = capture_module(Rotated(turn), (IDS, torch.arange(TOKENS).expand(ROWS, -1)), rows=ROWS, decode=False)
    with pytest.raises(UnsupportedModelError, match=f"queries of layer 0 cannot be told: .*{why}"):
        found_in(source)


def test_a_plain_factor_is_a_rotation_too() -> None:
    source = capture_module(
        Rotated(lambda x, angle: x * angle.cos()), (IDS, torch.arange(TOKENS).expand(ROWS, -1)), rows=ROWS, decode=False
    )
    _, (rotation,) = found_in(source)
    assert rotation.mean is not None
    position = (NEWEST[:, None] + torch.arange(1, COMING + 1))[..., None]
    expected = torch.diag_embed((position * 0.3 / (1 + torch.arange(8))).cos().mean(1))
    torch.testing.assert_close(rotation.mean(NEWEST), expected)
