"""What decode attention over slots of fewer bits becomes on a GPU, chosen on fake tensors."""

from __future__ import annotations

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

from xkv_fx.lowering.kernels.attention_triton import obstacle
from xkv_fx.runtime import coded_ops  # noqa: F401  (registers the ops)
from xkv_fx.runtime.quantize import Coding

xkv = torch.ops.xkv


def layer(slots: int = 1000, names: tuple[str, str] = ("int8", "int4"), dim: int = 128) -> list[torch.Tensor]:
    """q, k, v and the four buffers of two rows."""
    values = [on_gpu(2, heads, 1, dim) for heads in (32, 8, 8)]
    for name in names:
        coding = Coding.of(name, dim)
        values.append(on_gpu(2, 8, slots, coding.code_bytes, dtype=torch.uint8))
        values.append(on_gpu(2, 8, slots, coding.groups, coding.numbers, dtype=torch.float16))
    return values


def state(slots: int) -> list[torch.Tensor]:
    return [on_gpu(2, 8, slots, dtype=dtype) for dtype in (torch.int32, torch.float32)]


@needs_triton
def test_both_ops_are_served_and_share_counts_with_other_layers() -> None:
    def three_layers(*values: torch.Tensor) -> torch.Tensor:
        coded, plain, scored, (slot, slots, mask, seen, mean) = values[:7], values[7:12], values[12:21], values[21:]
        out = xkv.decode_coded(*coded, slot, mask, 0.1, 8, 4, key_mean=mean)
        out = out + xkv.decode_attention(*plain, slot, mask, 0.1)
        return out + xkv.decode_coded_scored(*scored, slots, mask, seen, 0.1, 8, 8, softcap=30.0)

    plain = [*layer()[:3], on_gpu(2, 8, 1000, 128), on_gpu(2, 8, 1000, 128)]
    scored = [*layer(names=("fp8", "fp8")), *state(1000)]
    slot, mask = masked()
    others = [slot, on_gpu(2, 8, dtype=torch.int64), mask, on_gpu(2, dtype=torch.int64), on_gpu(8, 128)]
    module = graph(three_layers, *layer(), *plain, *scored, *others)
    assert choose(module) == "3 layers by Triton kernel"
    first, second, third = triton_nodes(module)
    kinds = (xkv.decode_coded_triton, xkv.decode_attention_triton, xkv.decode_coded_scored_triton)
    assert (first.target, second.target, third.target) == tuple(kind.default for kind in kinds)
    assert first.args[9] is second.args[7] is third.args[11]
    assert first.args[15].meta["val"].dtype == torch.float32
    assert targets(module).count(torch.ops.aten.amax.default) == 1
    module.graph.lint()


def given(**changed: Any) -> dict[str, Any]:
    names = ("q", "k", "v", "k_cache", "k_scales", "v_cache", "v_scales")
    arguments = dict(zip(names, layer(), strict=True))
    return {**arguments, "mask": on_gpu(2, 1, 1, 1000), "key_bits": 8, "value_bits": 4, **changed}


@needs_triton
@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, None),
        ({"key_bits": 0}, None),
        ({"mask": (2, 32, 1, 1000)}, None),
        ({"q": (2, 32, 1, 128, torch.float64)}, "dtype torch.float64"),
        ({"v": (2, 8, 1, 128, torch.float16)}, "queries, keys and values of different dtypes"),
        ({"v_cache": (2, 8, 1000, 0, torch.uint8)}, "values that are the keys"),
        ({"key_bits": 0, "value_bits": 0}, "slots in the model's dtype by the op for fewer bits"),
        ({"k": (2, 8, 1, 21)}, "head sizes 21 and 128, of which one has no halves"),
        ({"q": (2, 1024, 1, 128)}, "128 queries a KV head of head sizes 128 and 128 are too many at once"),
        ({"mask": (2, 4, 1, 1000)}, "a mask of shape [2, 4, 1, 1000]"),
    ],
    ids=["served", "keys in the model's dtype", "bias", "double", "mixed", "latents", "0 bits", "odd", "wide", "mask"],
)
def test_what_it_does_not_serve(changed: dict[str, Any], why: str | None) -> None:
    from xkv_fx.runtime.kernels import decode_triton

    def tensor(shape: tuple[Any, ...]) -> torch.Tensor:
        sizes = [size for size in shape if isinstance(size, int)]
        return on_gpu(*sizes, dtype=torch.bfloat16 if len(sizes) == len(shape) else shape[-1])

    made = {name: tensor(value) if isinstance(value, tuple) else value for name, value in changed.items()}
    assert obstacle(decode_triton, given(**made)) == why
    spread = given()
    spread["v_scales"] = spread["v_scales"].transpose(0, 1)
    assert obstacle(decode_triton, spread) == "a cache that is not contiguous"


@needs_triton
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("eviction", ["ring", "scored"])
def test_inductor_is_given_the_kernel_itself(eviction: str) -> None:
    """Its launches are nodes, and what they change in place are a session's buffers and nothing else: for one split, so
    that no part of an output is made apart."""
    from xkv_fx.runtime.kernels import decode_coded_triton  # noqa: F401  (registers the ops)

    launch = (8, 4, None, None, None, 4, 64, 4, 3)

    def decode(*values: torch.Tensor) -> tuple[torch.Tensor]:
        count = torch.ones_like(values[7])
        return (xkv.decode_coded_triton(*values, count, 0.1, *launch),)

    def scored(*values: torch.Tensor) -> tuple[torch.Tensor]:
        *others, seen = values
        return (xkv.decode_coded_scored_triton(*others, seen, seen, 0.1, *launch),)

    slot, mask = masked(4096)
    seen = on_gpu(2, dtype=torch.int64)
    attend, values = decode, [*layer(4096), slot, mask]
    if eviction == "scored":
        attend, values = scored, [*layer(4096), *state(4096), on_gpu(2, 8, dtype=torch.int64), mask, seen]
    found = traced(attend, values)
    assert found.launches == (3 if eviction == "scored" else 2)
    assert not any("decode" in str(target) for target in found.targets)
    assert found.changed == ({3, 4, 5, 6, 7, 8} if eviction == "scored" else {3, 4, 5, 6})
    kept = {"k_cache", "k_scales", "v_cache", "v_scales"} | ({"positions", "scores"} if eviction == "scored" else set())
    assert found.written == kept
