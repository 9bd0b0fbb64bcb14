"""Compiles the Triton decode kernels for GPUs that need not be there, and checks what comes out. Run as a program."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xkv_fx.runtime.kernels import decode_triton

SHARED_BYTES = 99 * 1024  # what a program may have on the GPUs of compute capability 8.6, 8.9 and 12.0
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LIKE_Q = ("q", "k", "v", "k_cache", "v_cache", "mask")
POINTERS = {"slot": "*i64", "count": "*i64", "seen": "*i64", "positions": "*i32"}
FLOAT_POINTERS = ("out", "lse", "logits", "sink_logits", "parts", "whole_lse", "scores")
FLAGS = ("BIASED", "SCORED", "CAPPED", "SINKS", "ONE_SPLIT", "WIDEN")


def compiled(kernel: Any, capability: int, dtype: torch.dtype, constants: dict[str, Any], **options: int) -> Any:
    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in LIKE_Q:
            return f"*{NAMES[dtype]}"
        if name in FLOAT_POINTERS:
            return "*fp32"
        return POINTERS.get(name, "fp32" if name in ("scale", "softcap") else "i32")

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (_, kind) in enumerate(signature.items()) if kind[0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check_pass(capability: int, group: int, dims: tuple[int, int], dtype: torch.dtype, **chosen: Any) -> None:
    launch = decode_triton.plan_launch(1, 8, 32768, *dims, dtype, processors=100)
    constants = dict.fromkeys(FLAGS, False) | {"MASK_HEADS": 1} | chosen
    constants |= {"GROUP": group, "KEY_DIM": dims[0], "VALUE_DIM": dims[1], "BLOCK": launch.block}
    constants |= {"ROWS": decode_triton._rows(group)}
    constants |= {f"{name}_PAD": decode_triton._padded(dim) for name, dim in zip(("KEY", "VALUE"), dims, strict=True)}
    code = compiled(
        decode_triton._attend, capability, dtype, constants, num_warps=launch.warps, num_stages=launch.stages
    )
    assert code.metadata.shared <= SHARED_BYTES, code.metadata.shared
    assert "cp.async" in code.asm["ptx"]
    assert ("mma.sync" in code.asm["ptx"]) == (dtype != torch.float32)
    print(code.metadata.name, capability, dims, dtype)


if __name__ == "__main__":
    everything = dict.fromkeys(FLAGS, True) | {"BIASED": False, "ONE_SPLIT": False, "WIDEN": False}
    check_pass(80, 4, (128, 128), torch.bfloat16, **everything)
    check_pass(90, 3, (96, 64), torch.float16, BIASED=True, ONE_SPLIT=True)
    check_pass(90, 4, (128, 128), torch.float32)
    merging = {"VALUE_DIM": 80, "VALUE_PAD": 128, "SINKS": True, "AT_ONCE": decode_triton._MERGED_AT_ONCE}
    print(compiled(decode_triton._merge, 80, torch.float16, merging).metadata.name)
    adding = {"GROUP": 3, "ROWS": decode_triton._rows(3), "BLOCK": decode_triton._SCORED_AT_ONCE}
    print(compiled(decode_triton._add_scores, 80, torch.float16, adding).metadata.name)
