"""Capture of a plain PyTorch decoder: any module of `(input_ids, position_ids)` that returns logits."""

from __future__ import annotations

import copy
import hashlib
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from xkv_fx.capture.captured import CapturedModel
from xkv_fx.capture.check import check_capture
from xkv_fx.capture.export import export_graph, reason_of
from xkv_fx.capture.facts import ModelFacts
from xkv_fx.capture.shared_weights import SharedWeights
from xkv_fx.errors import UnsupportedModelError, XkvError
from xkv_fx.passes.analyses.find_attention import any_latent, attention_sites, cached_layers
from xkv_fx.passes.prepare.absorb_latents import AbsorbLatents
from xkv_fx.passes.prepare.find_positions import FindPositions, position_limit
from xkv_fx.passes.prepare.match_attention import MatchAttention
from xkv_fx.passes.prepare.specialize import one_token_graph
from xkv_fx.passes.tools.graph import output_node
from xkv_fx.runtime.autocast import refuse_autocast

PROBE_LENGTH = 24


def capture_module(
    module: Any, example_inputs: Any, rows: int = 1, check: bool = True, decode: bool = True
) -> CapturedModel:
    """Capture a module for `rows` batch rows, in evaluation mode. It is not changed, and its weights are shared.

    Args:
        module: called as `module(input_ids, position_ids)`, int64 `[rows, S]` each, for any S; returns logits
            `[rows, S, vocabulary]`.
        example_inputs: `(input_ids, position_ids)` as the module takes them, int64 `[any rows, S]`, S at least 1. Their
            tokens are those that the checks use.
        check: compare the graph's logits with the module's own, and those of a prompt fed in pieces.
        decode: make the graph of one token too.

    Raises:
        UnsupportedModelError: the module or its inputs are not as described, or it cannot be captured exactly; the
            message names the module or the node.
    """
    name = type(module).__name__
    if not isinstance(module, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {name}")
    tokens = _tokens(example_inputs)
    refuse_autocast(tokens.device)
    ids = tokens[torch.arange(rows * PROBE_LENGTH, device=tokens.device) % len(tokens)].view(rows, PROBE_LENGTH)
    positions = torch.arange(PROBE_LENGTH, device=ids.device).expand(rows, -1).contiguous()
    weights = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, weights).eval()
    try:
        with torch.no_grad():
            expected = twin(ids, positions)
        if not isinstance(expected, Tensor) or expected.shape[:2] != ids.shape or expected.dim() != 3:
            raise UnsupportedModelError("it does not return logits of shape [rows, S, vocabulary]")
        prompt, longest = _prompt_graph(twin, ids, positions, rows)
        token = one_token_graph(prompt, rows) if decode else None
        sites = attention_sites(prompt)
        dtype = sites[0].k.meta["val"].dtype
        if check:
            check_capture(prompt, token, ids, expected, dtype)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name} cannot be captured: {error}") from error
    except XkvError:
        raise
    except Exception as error:  # of the module's own code, which may raise anything while it is traced
        raise UnsupportedModelError(f"{name} cannot be captured: {reason_of(error)}") from error
    layers = cached_layers(sites)
    facts = ModelFacts(
        name=name,
        fingerprint=_fingerprint(module),
        dtype=dtype,
        device=ids.device,
        max_positions=longest,
        has_latents=any_latent(layers),
    )
    vocabulary = int(cast(Any, output_node(prompt.graph).args[0]).meta["val"].shape[2])
    shared = SharedWeights(name, dict(module.named_parameters()))
    return CapturedModel(prompt, token, layers, rows, vocabulary, facts, shared)


def _prompt_graph(twin: nn.Module, ids: Tensor, positions: Tensor, rows: int) -> tuple[GraphModule, int | None]:
    prompt, longest = export_graph(twin, (ids, positions), alone=True)
    limits = [limit for limit in (longest, position_limit(prompt, rows)) if limit is not None]
    longest = min(limits, default=None)
    MatchAttention(rows, longest).rewrite(prompt)
    attention_sites(prompt)
    FindPositions(rows, longest).rewrite(prompt)
    AbsorbLatents().rewrite(prompt)
    prompt.recompile()
    return prompt, longest


def _tokens(example_inputs: Any) -> Tensor:
    if not isinstance(example_inputs, tuple | list) or len(example_inputs) != 2:
        raise UnsupportedModelError("example_inputs must be (input_ids, position_ids), int64 of shape [rows, S] each")
    for tensor in example_inputs:
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.dim() != 2 or not tensor.numel():
            got = f"{tensor.dtype} of {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UnsupportedModelError(f"example_inputs must be int64 tensors of shape [rows, S]; got {got}")
    if example_inputs[0].shape != example_inputs[1].shape:
        raise UnsupportedModelError("example_inputs: input_ids and position_ids must have the same shape")
    flat: Tensor = example_inputs[0].flatten()
    return flat


def _fingerprint(module: nn.Module) -> str:
    shapes = [(name, tuple(tensor.shape)) for name, tensor in (*module.named_parameters(), *module.named_buffers())]
    digest = hashlib.sha256(repr((repr(module), shapes)).encode()).hexdigest()
    return f"{type(module).__name__}:{digest[:16]}"
