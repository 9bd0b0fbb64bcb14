"""What decode attention becomes on a GPU, chosen on fake tensors: no GPU is needed to choose."""

from __future__ import annotations

import importlib.util
import logging
import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_gpu import (  # noqa: F401  (some are fixtures)
    choose,
    graph,
    hopper,
    masked,
    mode,
    needs_triton,
    on_gpu,
    targets,
    traced,
    triton_nodes,
)

from xkv_fx.errors import BackendError
from xkv_fx.runtime import ops  # noqa: F401  (registers the ops)

xkv = torch.ops.xkv


def layer(
    heads: tuple[int, int] = (32, 8), dims: tuple[int, int] = (128, 128), slots: int = 1000, dtype: Any = torch.bfloat16
) -> list[torch.Tensor]:
    """q, k, v and the two buffers of two rows."""
    (queries, keys), (key_dim, value_dim) = heads, dims
    sizes = [(queries, 1, key_dim), (keys, 1, key_dim), (keys, 1, value_dim), (keys, slots, key_dim)]
    return [on_gpu(2, *size, dtype=dtype) for size in (*sizes, (keys, slots, value_dim))]


def decode(*values: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = xkv.decode_attention(*values[:7], 0.1)
    return out


@needs_triton
def test_layers_that_share_a_mask_share_its_count() -> None:
    def two_layers(*values: torch.Tensor) -> torch.Tensor:
        slot, mask = values[10:]
        short = torch.ops.aten.slice.Tensor(mask, 3, 0, 600)
        first = xkv.decode_attention(*values[:5], slot, mask, 0.1)
        return first + xkv.decode_attention(*values[5:10], slot, short, 0.1, softcap=30.0)

    module = graph(two_layers, *layer(), *layer(slots=600), *masked())
    assert choose(module) == "2 layers by Triton kernel"
    first, second = triton_nodes(module)
    assert first.target is second.target is xkv.decode_attention_triton.default
    assert first.args[7] is second.args[7]
    assert second.args[9] == 30.0
    assert targets(module).count(torch.ops.aten.amax.default) == 1
    module.graph.lint()


def scored(*values: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = xkv.decode_scored(*values, 0.1)
    return out


def scored_layer(slots: int) -> list[torch.Tensor]:
    state = [on_gpu(2, 8, slots, dtype=dtype) for dtype in (torch.int32, torch.float32)]
    slot, mask = on_gpu(2, 8, dtype=torch.int64), masked(slots)[1]
    return [*layer(slots=slots), *state, slot, mask, on_gpu(2, dtype=torch.int64)]


@needs_triton
def test_eviction_by_score_is_served() -> None:
    values = scored_layer(1000)
    module = graph(scored, *values)
    assert choose(module) == "1 layers by Triton kernel"
    assert triton_nodes(module)[0].target is xkv.decode_scored_triton.default
    module.graph.lint()


@needs_triton
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (lambda: [*layer(dtype=torch.float64), *masked(dtype=torch.float64)], "dtype torch.float64"),
        (lambda: [*layer((128, 1), (576, 512)), *masked()], "128 queries a KV head of head sizes 576 and 512"),
    ],
    ids=["float64", "latent"],
)
def test_what_is_not_served_is_announced(values: Callable[[], list[torch.Tensor]], reason: str) -> None:
    module = graph(decode, *values())
    with unittest.TestCase().assertLogs("xkv_fx", logging.WARNING) as log:
        chosen = choose(module)
    assert chosen.startswith("1 layers by torch ops (")
    assert reason in chosen
    assert reason in "".join(log.output)


def test_without_triton_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="Triton is missing"):
        choose(graph(decode, *layer(), *masked()))


def decode_by_kernel(*values: torch.Tensor) -> tuple[torch.Tensor]:
    count = torch.ones_like(values[5])
    return (xkv.decode_attention_triton(*values[:7], count, 0.1, None, None, 4, 64, 4, 3),)


def scored_by_kernel(*values: torch.Tensor) -> tuple[torch.Tensor]:
    *others, seen = values
    return (xkv.decode_scored_triton(*others, seen, seen, 0.1, None, None, 4, 64, 4, 3),)


@needs_triton
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("eviction", ["ring", "scored"])
def test_inductor_is_given_the_kernels_themselves(eviction: str) -> None:
    """Traced as Inductor and AOTInductor do it, the op is not opaque: its launches are nodes, and what they change in
    place are a session's buffers and nothing else."""
    scores = eviction == "scored"
    attend, buffers, launches = (scored_by_kernel, {3, 4, 5, 6}, 3) if scores else (decode_by_kernel, {3, 4}, 2)
    given = scored_layer(4096) if scores else [*layer(slots=4096), *masked(4096)]
    seen = traced(attend, given)
    assert seen.launches == launches
    assert not any("decode" in str(target) for target in seen.targets)
    assert seen.changed == buffers
    assert seen.written == ({"k_cache", "v_cache", "positions", "scores"} if scores else {"k_cache", "v_cache"})
