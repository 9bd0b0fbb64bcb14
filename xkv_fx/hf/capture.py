"""Capture: a transformers model becomes a graph with one `xkv::attention` node for each layer.

The way in is transformers' own attention interface: an entry named `xkv` whose mask is None, so that no mask arithmetic
enters the graph, and whose attention is our op. A model that does not go through it writes its attention out; there the
pass `MatchAttention` looks for it in the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from xkv_fx.capture.captured import UNSHARDED, CapturedModel
from xkv_fx.capture.check import check_capture
from xkv_fx.capture.export import check_alone, export_graph, reason_of
from xkv_fx.capture.plain_module import PROBE_LENGTH
from xkv_fx.errors import UnsupportedModelError, XkvError
from xkv_fx.hf.attention_entry import NAME
from xkv_fx.hf.inspect import check_model, ends_early, fingerprint, has_latents, max_positions, shadow
from xkv_fx.hf.masks import FARTHEST, OutOfSightError, check_masks, recording_masks
from xkv_fx.hf.rotary import changing_rotary
from xkv_fx.hf.tensor_parallel import shards_of, use_shards
from xkv_fx.layers import LayerSpec
from xkv_fx.passes.analyses.find_attention import attention_sites, cached_layers
from xkv_fx.passes.prepare.absorb_latents import AbsorbLatents
from xkv_fx.passes.prepare.clean_graph import CleanGraph
from xkv_fx.passes.prepare.find_positions import FindPositions
from xkv_fx.passes.prepare.match_attention import MatchAttention
from xkv_fx.passes.prepare.specialize import one_token_graph
from xkv_fx.passes.tools.graph import output_node


class _Entry(nn.Module):
    """`(input_ids, position_ids)` -> logits of every token, without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return _logits(self.model, input_ids, position_ids)


def _logits(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Logits without a cache. A model that takes no positions counts them itself."""
    kinds = {name: parameter.kind for name, parameter in inspect.signature(model.forward).parameters.items()}
    takes_positions = "position_ids" in kinds or inspect.Parameter.VAR_KEYWORD in kinds.values()
    options = {"position_ids": position_ids} if takes_positions else {}
    logits: Tensor = model(input_ids=input_ids, use_cache=False, return_dict=True, **options).logits
    return logits


def capture(model: Any, rows: int = 1, check: bool = True, decode: bool = True) -> CapturedModel:
    """Capture a transformers causal language model for `rows` batch rows.

    Args:
        model: it is not changed, and its weights are shared, not copied.
        check: compare the graph's logits with the model's own on a short random prompt.
        decode: capture the graph of one token too.

    Raises:
        UnsupportedModelError: the model cannot be captured exactly; the message says what stands in the way.
    """
    model = check_model(model)
    shards = shards_of(model)
    twin, probed = _twin(model)
    longest = max_positions(model)
    device = model.device
    example = min(PROBE_LENGTH, longest or PROBE_LENGTH)
    ids = torch.zeros(rows, example, dtype=torch.int64, device=device)
    positions = torch.arange(example, device=device).expand(rows, -1).contiguous()
    entry = _Entry(twin)
    with _refusing(model):
        prompt, longest = export_graph(entry, (ids, positions), longest)
        if shards is None:
            check_alone(prompt.graph)
        rewritten = _rewrite(prompt, rows, longest, written=not probed)
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
    _check_layer_count(model, len(sites))
    for found in (probed or layers, layers if token is None else cached_layers(attention_sites(token))):
        if found != layers:
            raise UnsupportedModelError(
                f"{type(model).__name__}: export kept {len(layers)} attentions of the {len(found)} that ran"
            )
    if has_latents(model):
        layers = _absorb_latents(prompt, token)
    logits = cast(Any, output_node(prompt.graph).args[0]).meta["val"]
    if logits.dim() != 3:
        raise UnsupportedModelError(f"{type(model).__name__} gives no logits for each token; it is no language model")
    if check:
        _check(model, prompt, token, rows)
    return CapturedModel(
        prompt=prompt,
        token=token,
        layers=layers,
        fingerprint=fingerprint(model),
        rows=rows,
        dtype=model.dtype,
        device=device,
        max_positions=longest,
        vocabulary=int(logits.shape[2]),
        ends_early=ends_early(model),
        shard=shards or UNSHARDED,
    )


def _twin(model: PreTrainedModel) -> tuple[PreTrainedModel, tuple[LayerSpec, ...]]:
    """A shadow of the model to capture, and what its attentions cache; nothing where it writes its attention out."""
    shards = shards_of(model)
    try:
        twin = shadow(model, NAME)
    except UnsupportedModelError:  # its attention cannot be replaced
        return use_shards(shadow(model, None), shards), ()
    record = _probe(use_shards(twin, shards))
    if not record.attentions:
        return use_shards(shadow(model, None), shards), ()
    _check_layer_count(model, record.attentions)
    return twin, tuple(record.layers)


def _rewrite(prompt: GraphModule, rows: int, longest: int | None, written: bool) -> bool:
    """Find what capture did not: attention that is written out, and positions counted from the length.

    Returns:
        whether the graph is another one than export gives.
    """
    CleanGraph()(prompt)
    if written:
        MatchAttention(rows, longest)(prompt)
    attention_sites(prompt)
    return bool(FindPositions(rows, longest)(prompt).changed) or written


def _absorb_latents(prompt: GraphModule, token: GraphModule | None) -> tuple[LayerSpec, ...]:
    """What is cached once latents are, where they can be."""
    cached = []
    for module in (prompt,) if token is None else (prompt, token):
        AbsorbLatents()(module)
        cached.append(cached_layers(attention_sites(module)))
    if cached[0] != cached[-1]:
        raise UnsupportedModelError("a prompt and a single token do not make their keys and values alike")
    return cached[0]


def layers_of_model(model: Any) -> tuple[LayerSpec, ...]:
    """What each layer of a transformers causal language model caches; runs it once on shapes alone.

    Raises:
        UnsupportedModelError: as `capture`.
    """
    model = check_model(model)
    if has_latents(model):  # which the graph alone shows
        return capture(model, check=False, decode=False).layers
    _, layers = _twin(model)
    return layers or capture(model, decode=False).layers


class _RecordAttention(TorchDispatchMode):
    """What each attention caches; one that attends to the K/V of an earlier one, nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers: list[LayerSpec] = []
        self.windows: list[int | None] = []
        self._cached: list[tuple[Tensor, Tensor, int | None]] = []

    @property
    def attentions(self) -> int:
        return len(self.windows)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.xkv.attention.default:
            q, k, v = args[:3]
            window = args[5] if len(args) > 5 else None
            self.windows.append(window)
            if not any(k is keys and v is values and window == other for keys, values, other in self._cached):
                self._cached.append((k, v, window))
                value_dim = 0 if v is k else v.shape[3]
                self.layers.append(LayerSpec(q.shape[1], k.shape[1], k.shape[3], value_dim, k.dtype.itemsize, window))
        return func(*args, **(kwargs or {}))


def _probe(twin: PreTrainedModel, length: int = 2) -> _RecordAttention:
    """What the attentions of a model cache, from a run on `length` tokens."""
    ids = torch.zeros(1, length, dtype=torch.int64, device=twin.device)
    positions = torch.arange(length, device=twin.device)[None]
    record = _RecordAttention()
    with _refusing(twin), torch.no_grad(), recording_masks() as masks, record:
        _Entry(twin)(ids, positions)
    if not record.attentions:
        return record
    windows = record.windows
    longest = max_positions(twin) or FARTHEST
    try:
        check_masks(twin, masks, windows, length - 1 if length > 2 else min(longest, FARTHEST) - 1)
    except OutOfSightError:
        enough = min(2 * max((window or 0 for window in windows), default=0) + 64, longest)
        return _probe(twin, max(enough, 3))
    return record


@contextmanager
def _refusing(model: nn.Module) -> Iterator[None]:
    """Whatever goes wrong while a model is traced means that it cannot be captured."""
    try:
        yield
    except UnsupportedModelError as error:
        if type(model).__name__ in str(error):
            raise
        raise UnsupportedModelError(f"{type(model).__name__} cannot be captured: {error}") from error
    except XkvError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be captured: {reason_of(error)}") from error


def _check_layer_count(model: PreTrainedModel, attentions: int) -> None:
    """Fewer attentions than layers: the others hold some other state. More: each has a cache of its own."""
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    if attentions < expected:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {expected} layers but {attentions} attentions; models that mix in other "
            "kinds of layers (recurrent, linear attention, convolution), whose state is no KV cache, are not supported"
        )


def _random_ids(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    return torch.randint(vocabulary, (rows, length), generator=generator).to(model.device)


def _reference(model: PreTrainedModel) -> PreTrainedModel:
    """What the graphs are compared with: the model as it is evaluated, under an attention that is not ours."""
    if model.config.get_text_config(decoder=True)._attn_implementation == NAME:
        return shadow(model, "eager", settled=False)
    return shadow(model, None, settled=False) if model.training or changing_rotary(model) else model


def _check(model: PreTrainedModel, prompt: GraphModule, token: GraphModule | None, rows: int) -> None:
    """Run the model and its graphs on the same random tokens."""
    ids = _random_ids(model, rows, min(PROBE_LENGTH, max_positions(model) or PROBE_LENGTH))
    positions = torch.arange(ids.shape[1], device=model.device).expand(rows, -1).contiguous()
    with torch.no_grad():
        expected = _logits(_reference(model), ids, positions)
    with _refusing(model):
        try:
            check_capture(prompt, token, ids, expected, model.dtype)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{type(model).__name__}: {error}") from error
