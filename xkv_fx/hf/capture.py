"""Capture: a transformers model becomes a graph with one `xkv::attention` node for each layer.

The way in is transformers' own attention interface: an entry named `xkv` whose mask is None, so that no mask arithmetic
enters the graph, and whose attention is our op. A model that does not use it writes its attention out; there
the pass `MatchAttention` looks for it in the graph.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers import PreTrainedModel

from xkv_fx.capture.captured import CapturedModel
from xkv_fx.capture.check import check_capture, difference, tolerance
from xkv_fx.capture.export import OneGradMode, export_graph, refusing
from xkv_fx.capture.facts import UNSHARDED
from xkv_fx.capture.plain_module import PROBE_LENGTH
from xkv_fx.capture.shared_weights import SharedWeights
from xkv_fx.errors import UnsupportedModelError
from xkv_fx.hf.attention_entry import CAPTURED_NAME, NAME, PICKING_NAME
from xkv_fx.hf.indexers import MORE_THAN_ANY, pick
from xkv_fx.hf.inspect import TransformersFacts, nothing_to_budget, read_model
from xkv_fx.hf.probe import logits_of, probe
from xkv_fx.hf.recurrences import attends, keeps_states, replace_recurrences, with_step
from xkv_fx.hf.shadow import shadow
from xkv_fx.hf.tensor_parallel import use_shards
from xkv_fx.layers import LayerSpec
from xkv_fx.passes.analyses.find_attention import attention_sites, cached_layers
from xkv_fx.passes.prepare.absorb_latents import AbsorbLatents
from xkv_fx.passes.prepare.bind_recurrences import BindRecurrences
from xkv_fx.passes.prepare.find_positions import FindPositions, position_limit
from xkv_fx.passes.prepare.match_attention import MatchAttention
from xkv_fx.passes.prepare.match_indexers import MatchIndexers
from xkv_fx.passes.prepare.specialize import one_token_graph
from xkv_fx.passes.tools.graph import output_node
from xkv_fx.runtime.recurrence import Recurrence


def capture(model: Any, rows: int = 1, check: bool = True, decode: bool = True) -> CapturedModel:
    """Capture a transformers causal language model for `rows` batch rows.

    Args:
        model: it is not changed, and its weights are shared, not copied.
        check: compare the graph's logits with the model's own on a short random prompt.
        decode: capture the graph of one token too.

    Raises:
        UnsupportedModelError: the model cannot be captured exactly; the message says what stands in the way.
    """
    source, facts = read_model(model)
    return capture_source(source, facts, rows, check, decode, given=model)


def capture_source(
    source: PreTrainedModel,
    facts: TransformersFacts,
    rows: int = 1,
    check: bool = True,
    decode: bool = True,
    given: nn.Module | None = None,
) -> CapturedModel:
    """As `capture`, for a model that was read already.

    Args:
        given: what holds `source`, such as a peft model; its logits are the reference. `source` itself when None.
    """
    captured = _capture_twin(source, facts, _twin_of(source, facts), rows, check, decode)
    if check and given is not None and given is not source:
        _check_around(given, source, facts, captured)
    return captured


def layers_of_model(model: Any) -> tuple[LayerSpec, ...]:
    """What each layer of a transformers causal language model caches; runs it once on a few tokens.

    Raises:
        UnsupportedModelError: as `capture`.
    """
    return layers_of_source(*read_model(model))


def layers_of_source(source: PreTrainedModel, facts: TransformersFacts) -> tuple[LayerSpec, ...]:
    """As `layers_of_model`, for a model that was read already."""
    twin = _twin_of(source, facts)
    if facts.has_latents:  # which the graph alone shows
        return _capture_twin(source, facts, twin, check=False, decode=False).layers
    return twin.layers or _capture_twin(source, facts, twin, decode=False).layers


@dataclasses.dataclass(frozen=True)
class _Twin:
    """A shadow of a model, to capture.

    Attributes:
        layers: what its attentions cache; nothing where it writes its attention out.
        recurrences: its layers that mix tokens by a state.
    """

    model: PreTrainedModel
    layers: tuple[LayerSpec, ...]
    recurrences: tuple[Recurrence, ...] = ()


def _twin_of(source: PreTrainedModel, facts: TransformersFacts) -> _Twin:
    if facts.picked is not None:
        return _indexed_twin(source, facts)
    if keeps_states(source):
        return _hybrid_twin(source, facts)
    try:
        twin = shadow(source, facts, NAME)
    except UnsupportedModelError:  # its attention cannot be replaced
        return _unreplaced(source, facts)
    attentions = probe(use_shards(twin, facts.shard), facts)
    if not attentions.count:
        return _unreplaced(source, facts)
    _check_layer_count(facts, attentions.count, facts.hidden_layers)
    twin.set_attn_implementation(CAPTURED_NAME)  # its masks are known, and need not be made again
    return _Twin(twin, attentions.layers)


def _hybrid_twin(source: PreTrainedModel, facts: TransformersFacts) -> _Twin:
    """A shadow of a model some of whose layers mix tokens by a state instead of attention."""
    if not attends(source):
        raise nothing_to_budget(facts.name)
    if facts.shard != UNSHARDED:
        raise UnsupportedModelError(
            f"{facts.name} is split among processes and has recurrent layers, whose states are not split with them; "
            "load it whole"
        )
    twin = shadow(source, facts, NAME)
    recurrences = replace_recurrences(twin, facts)
    attentions = probe(twin, facts)
    if not attentions.count:
        raise UnsupportedModelError(
            f"{facts.name} has recurrent layers, and attention that does not go through transformers' attention "
            "interface; both together are not supported"
        )
    _check_layer_count(facts, attentions.count, recurrences.attentions)
    twin.set_attn_implementation(CAPTURED_NAME)
    return _Twin(twin, attentions.layers, recurrences.found)


def _indexed_twin(source: PreTrainedModel, facts: TransformersFacts) -> _Twin:
    """A shadow of a model some of whose attentions reach only the keys that an indexer picks."""
    for holds, what in ((facts.shard != UNSHARDED, "is split among processes"), (keeps_states(source), "is a hybrid")):
        if holds:
            raise UnsupportedModelError(f"{facts.name} has indexers and {what}; both together are not supported")
    twin = shadow(source, facts, PICKING_NAME)
    pick(twin, 1)  # as it shows whether that number is all that decides how many
    attentions = probe(twin, facts)
    if not attentions.picked or set(attentions.picked) != {1}:
        raise UnsupportedModelError(
            f"{facts.name} cannot be captured: its indexers do not give its attention the keys that they pick"
        )
    _check_layer_count(facts, attentions.count, facts.hidden_layers)
    pick(twin, MORE_THAN_ANY)
    return _Twin(twin, attentions.layers)


def _unreplaced(source: PreTrainedModel, facts: TransformersFacts) -> _Twin:
    """A shadow that attends as the model does. It is a second copy: the first has lost which attention each part of the
    model had."""
    return _Twin(use_shards(shadow(source, facts, None), facts.shard), ())


class _Entry(nn.Module):
    """`(input_ids, position_ids)` -> logits of every token, without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        with OneGradMode():
            return logits_of(self.model, input_ids, position_ids)


def _capture_twin(
    source: PreTrainedModel,
    facts: TransformersFacts,
    twin: _Twin,
    rows: int = 1,
    check: bool = True,
    decode: bool = True,
) -> CapturedModel:
    example = min(PROBE_LENGTH, facts.max_positions or PROBE_LENGTH)
    ids = torch.zeros(rows, example, dtype=torch.int64, device=facts.device)
    positions = torch.arange(example, device=facts.device).expand(rows, -1).contiguous()
    entry = _Entry(twin.model)
    with refusing(facts.name):
        written = not twin.layers
        recurrences = tuple(with_step(layer, rows) if decode else layer for layer in twin.recurrences)
        prompt, longest, rewritten = _prompt_graph(
            entry, (ids, positions), facts, facts.max_positions, written, recurrences
        )
        if longest is not None and not facts.ends_early and _placed_by_slopes(prompt, rows):
            with contextlib.suppress(UnsupportedModelError):  # a table of slopes has an end
                unbounded = _prompt_graph(entry, (ids, positions), facts, None, written)
                if unbounded[1] is None:
                    prompt, longest, rewritten = unbounded
        token = None
        if decode:
            try:
                token = one_token_graph(prompt, rows)
            except GuardOnDataDependentSymNode:  # sizes are read off the tokens (JetMoe)
                if rewritten:
                    raise
                token, _ = export_graph(entry, (ids[:, :1].clone(), positions[:, :1].clone()))
    sites = attention_sites(prompt)
    layers = cached_layers(sites)
    if not recurrences:
        _check_layer_count(facts, len(sites), facts.hidden_layers)
    seen = tuple(dataclasses.replace(spec, index_dim=0) for spec in layers)
    of_token = layers if token is None else cached_layers(attention_sites(token))
    for found, expected in ((twin.layers or seen, seen), (of_token, layers)):
        if found != expected:
            raise UnsupportedModelError(
                f"{facts.name}: export kept {len(layers)} attentions of the {len(found)} that ran"
            )
    if facts.has_latents:
        layers = _absorb_latents(prompt, token)
    logits = cast(Any, output_node(prompt.graph).args[0]).meta["val"]
    if logits.dim() != 3:
        raise UnsupportedModelError(f"{facts.name} gives no logits for each token; it is no language model")
    if check:
        _check(source, facts, prompt, token, rows)
    vocabulary = int(logits.shape[2])
    weights = SharedWeights(facts.name, dict(source.named_parameters()))
    facts = dataclasses.replace(facts, max_positions=longest)
    return CapturedModel(prompt, token, layers, rows, vocabulary, facts, weights, recurrences)


def _prompt_graph(
    entry: nn.Module,
    inputs: tuple[Tensor, Tensor],
    facts: TransformersFacts,
    longest: int | None,
    written: bool,
    recurrences: Sequence[Recurrence] = (),
) -> tuple[GraphModule, int | None, bool]:
    """The prompt graph, the length up to which it matches the model, and whether it differs from what export gives."""
    prompt, longest = export_graph(entry, inputs, longest, alone=facts.shard == UNSHARDED)
    BindRecurrences(recurrences)(prompt)
    if facts.picked is not None:
        MatchIndexers(facts.picked)(prompt)
    return prompt, longest, _rewrite(prompt, inputs[0].shape[0], longest, written)


def _placed_by_slopes(prompt: GraphModule, rows: int) -> bool:
    """Whether positions enter only as distances (ALiBi), which have no upper limit: the model length in such a
    configuration is only what the model was trained on."""
    slopes = all(site.form.slopes is not None for site in attention_sites(prompt))
    return slopes and position_limit(prompt, rows) is None


def _rewrite(prompt: GraphModule, rows: int, longest: int | None, written: bool) -> bool:
    """Find what capture did not: attention that is written out, and positions counted from the length.

    Returns:
        whether the graph differs from what export gives.
    """
    if written:
        MatchAttention(rows, longest).rewrite(prompt)
    attention_sites(prompt)
    found = FindPositions(rows, longest)(prompt)
    return bool(found.changed) or written


def _absorb_latents(prompt: GraphModule, token: GraphModule | None) -> tuple[LayerSpec, ...]:
    """Absorb latents where possible; returns what is cached then."""
    cached = []
    for module in (prompt,) if token is None else (prompt, token):
        AbsorbLatents()(module)
        cached.append(cached_layers(attention_sites(module)))
    if cached[0] != cached[-1]:
        raise UnsupportedModelError("a prompt and a single token do not make their keys and values alike")
    return cached[0]


def _check_layer_count(facts: TransformersFacts, attentions: int, layers: int | None) -> None:
    """Fewer attentions than layers: the others hold some other state. More: each has a cache of its own.

    Args:
        layers: how many should attend.
    """
    if layers is None:
        raise UnsupportedModelError(
            f"{facts.name}: its configuration has no num_hidden_layers, so that nobody can tell whether it has layers "
            "besides its attentions, whose state is no KV cache"
        )
    if attentions < layers:
        raise UnsupportedModelError(
            f"{facts.name} has {layers} layers but {attentions} attentions; layers that keep another state (recurrent, "
            "linear attention, convolution) are supported only where transformers' cache has that state"
        )


def _probe_tokens(model: PreTrainedModel, facts: TransformersFacts, rows: int) -> tuple[Tensor, Tensor]:
    """Random tokens and their positions."""
    length = min(PROBE_LENGTH, facts.max_positions or PROBE_LENGTH)
    generator = torch.Generator().manual_seed(0)
    vocabulary = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    ids = torch.randint(vocabulary, (rows, length), generator=generator).to(facts.device)
    return ids, torch.arange(length, device=facts.device).expand(rows, -1).contiguous()


def _reference(source: PreTrainedModel, facts: TransformersFacts) -> PreTrainedModel:
    """What the graphs are compared with: the model as it is evaluated, under an attention that is not ours.

    Mostly that is the model itself. Otherwise it is a second copy beside the captured one, with other attention and
    other angles.
    """
    if source.config.get_text_config(decoder=True)._attn_implementation == NAME:
        return shadow(source, facts, "eager", settled=False)
    return shadow(source, facts, None, settled=False) if source.training or facts.rotary else source


def _check_around(given: nn.Module, source: PreTrainedModel, facts: TransformersFacts, captured: CapturedModel) -> None:
    """Check that whatever wraps a model does nothing to its tokens that the graph does not do too."""
    reference = _reference(source, facts)
    if reference is not source or given.training:
        kept = {id(tensor): tensor for tensor in (*given.parameters(), *given.buffers())}
        given = copy.deepcopy(given, {**kept, id(source): reference}).eval()
    ids, positions = _probe_tokens(source, facts, captured.rows)
    name = f"{type(given).__name__} around {facts.name}"
    with refusing(name), torch.no_grad():
        expected = logits_of(given, ids, positions, source)
        error, limit = difference(captured.prompt(ids, positions), expected, facts.dtype), tolerance(facts.dtype)
    if not error <= limit:
        raise UnsupportedModelError(
            f"{name} cannot be captured: its logits differ from those of the {facts.name} in it by {error:.2g} of the "
            f"largest (limit {limit:.0e}), so that it acts outside of the model's layers"
        )


def _check(
    source: PreTrainedModel, facts: TransformersFacts, prompt: GraphModule, token: GraphModule | None, rows: int
) -> None:
    """Run the model and its graphs on the same random tokens."""
    ids, positions = _probe_tokens(source, facts, rows)
    with torch.no_grad():
        expected = logits_of(_reference(source, facts), ids, positions)
    with refusing(facts.name):
        try:
            check_capture(prompt, token, ids, expected, facts.dtype)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{facts.name}: {error}") from error
