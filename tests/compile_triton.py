"""Compiles the Triton decode kernels for GPUs that need not be there, and checks what comes out. Run as a program."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xkv_fx.runtime.kernels import decode_coded_triton, decode_triton

SHARED_BYTES = 99 * 1024  # what a program may have on the GPUs of compute capability 8.6, 8.9 and 12.0
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LIKE_Q = ("q", "k", "v", "k_cache", "v_cache", "mask")
SCALES = {"model": 0, "int8": 2, "int4": 2, "fp8": 1}
BITS = {"model": 0, "int8": 8, "int4": 4, "fp8": 8}
POINTERS = {"slot": "*i64", "count": "*i64", "seen": "*i64", "positions": "*i32"}
FLOAT_POINTERS = ("out", "lse", "logits", "sink_logits", "parts", "whole_lse", "scores", "key_mean")
FLAGS = ("BIASED", "SCORED", "CAPPED", "SINKS", "ONE_SPLIT", "WIDEN")


def compiled(
    kernel: Any,
    capability: int,
    dtype: torch.dtype,
    constants: dict[str, Any],
    pointers: dict[str, str] | None = None,
    **options: int,
) -> Any:
    """A kernel as it is compiled for a GPU.

    Args:
        pointers: the types of arguments that are not what they are for every kernel.
    """

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if pointers is not None and name in pointers:
            return pointers[name]
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
    constants |= {"ROWS": decode_triton.padded_rows(group)}
    constants |= {f"{name}_PAD": decode_triton.padded(dim) for name, dim in zip(("KEY", "VALUE"), dims, strict=True)}
    code = compiled(
        decode_triton._attend, capability, dtype, constants, num_warps=launch.warps, num_stages=launch.stages
    )
    assert code.metadata.shared <= SHARED_BYTES, code.metadata.shared
    assert "cp.async" in code.asm["ptx"]
    assert ("mma.sync" in code.asm["ptx"]) == (dtype != torch.float32)
    print(code.metadata.name, capability, dims, dtype)


def check_coded(
    capability: int, group: int, dims: tuple[int, int], dtype: torch.dtype, names: tuple[str, str], **chosen: Any
) -> None:
    """The kernel for slots of fewer bits: no register is spilled, and codes are copied 16 bytes at once."""
    launch = decode_triton.plan_launch(1, 8, 32768, *dims, dtype, processors=100)
    buffers: list[torch.Tensor] = []
    pointers = {}
    for field, name in zip("kv", names, strict=True):
        buffers += [torch.empty(0), torch.empty(0, SCALES[name])]
        pointers[f"{field}_cache"] = "*u8" if BITS[name] else f"*{NAMES[dtype]}"
        pointers[f"{field}_scales"] = "*fp16" if BITS[name] else f"*{NAMES[dtype]}"
    constants = dict.fromkeys((*FLAGS, "CENTRED"), False) | {"MASK_HEADS": 1} | chosen
    constants |= {"GROUP": group, "ROWS": decode_triton.padded_rows(group), "BLOCK": launch.block}
    constants |= {"PRECISION": decode_coded_triton.precision(dtype)}
    constants |= decode_coded_triton.layouts(tuple(buffers), (BITS[names[0]], BITS[names[1]]), dims)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    code = compiled(decode_coded_triton._attend_coded, capability, dtype, constants, pointers, **options)
    registers, spilled = resources(code.asm["cubin"])
    assert spilled == 0, (names, dims, registers, spilled)
    assert registers * 32 * launch.warps * 2 <= 65536, registers  # at least two programs on a multiprocessor
    assert code.metadata.shared <= SHARED_BYTES, code.metadata.shared
    wide = re.findall(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", code.asm["ptx"])
    assert wide, names
    assert "mma.sync.aligned.m16n8k16" in code.asm["ptx"]
    print(code.metadata.name, capability, dims, dtype, names, registers)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills into memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    everything = dict.fromkeys(FLAGS, True) | {"BIASED": False, "ONE_SPLIT": False, "WIDEN": False}
    check_pass(80, 4, (128, 128), torch.bfloat16, **everything)
    check_pass(90, 3, (96, 64), torch.float16, BIASED=True, ONE_SPLIT=True)
    check_pass(90, 4, (128, 128), torch.float32)
    merging = {"VALUE_DIM": 80, "VALUE_PAD": 128, "SINKS": True, "AT_ONCE": decode_triton._MERGED_AT_ONCE}
    print(compiled(decode_triton._merge, 80, torch.float16, merging).metadata.name)
    adding = {"GROUP": 3, "ROWS": decode_triton.padded_rows(3), "BLOCK": decode_triton._SCORED_AT_ONCE}
    print(compiled(decode_triton._add_scores, 80, torch.float16, adding).metadata.name)
    check_coded(90, 4, (128, 128), torch.bfloat16, ("int8", "int8"), CENTRED=True, SINKS=True, ONE_SPLIT=True)
    check_coded(90, 4, (128, 128), torch.bfloat16, ("int4", "int4"), CENTRED=True, CAPPED=True, SCORED=True)
    check_coded(80, 8, (128, 128), torch.float16, ("int8", "int4"))
    check_coded(80, 3, (64, 64), torch.bfloat16, ("fp8", "model"), BIASED=True)
    check_coded(100, 8, (256, 256), torch.bfloat16, ("int4", "fp8"))
