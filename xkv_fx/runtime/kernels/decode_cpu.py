"""Decode attention on CPU by a kernel of our own, `decode_cpu.cpp`, built for the shapes of a model when it is lowered.

torch's paths read kept K/V at well under half of the memory's speed for one query; this one reads each kept K/V once
for the whole query group.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import threading

import torch
from torch import Tensor

from xkv_fx.errors import BackendError

DTYPES = {torch.float32: "DTYPE_FLOAT32", torch.bfloat16: "DTYPE_BFLOAT16", torch.float16: "DTYPE_FLOAT16"}
STEP = 16
"""Head sizes are multiples of this."""
ARGUMENTS = ("q", "k", "v", "k_cache", "v_cache", "slot", "mask", "scale", "softcap", "sinks")

_building = threading.Lock()
_library = torch.library.Library("xkv", "FRAGMENT")
_library.define(
    "decode_attention_cpu(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot, "
    "Tensor mask, float scale, float? softcap=None, Tensor? sinks=None) -> Tensor"
)


@functools.cache
def build(dtype: torch.dtype, group: int, key_dim: int, value_dim: int) -> ctypes.CDLL:
    """Compile the kernel, or load it from Inductor's cache on disk.

    Args:
        dtype: one of `DTYPES`.
        group: query heads for each KV head.

    Raises:
        BackendError: there is no C++ compiler, or it refuses the kernel.
    """
    from torch._inductor.codecache import CppCodeCache  # loads the compiler, which those who only run graphs do without

    source = importlib.resources.files(__package__).joinpath("decode_cpu.cpp").read_text()
    shape = {"KEY_DIM": key_dim, "VALUE_DIM": value_dim, "GROUP": group, DTYPES[dtype]: 1}
    try:
        with _building:
            library: ctypes.CDLL = CppCodeCache.load(
                "".join(f"#define {n} {v}\n" for n, v in shape.items()) + source, extra_flags=("-ffp-contract=fast",)
            )
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BackendError(f"the CPU decode kernel could not be built ({reason}); it needs a C++ compiler") from error
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.xkv_decode.argtypes = [*[pointer] * 9, *[size] * 4, ctypes.c_float, ctypes.c_float, ctypes.c_int]
    library.xkv_decode.restype = ctypes.c_int
    return library


def decode_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `xkv::decode_attention`, which says what the arguments are; K/V buffers are contiguous."""
    rows, kv_heads, slots, key_dim = k_cache.shape
    kernel = build(q.dtype, q.shape[1] // kv_heads, key_dim, v_cache.shape[3])
    q, k, v, mask = q.contiguous(), k.contiguous(), v.contiguous(), mask.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    out = torch.empty((*q.shape[:3], v_cache.shape[3]), dtype=q.dtype)
    wrong = kernel.xkv_decode(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), slot.data_ptr(),
        mask.data_ptr(), None if sinks is None else sinks.data_ptr(), out.data_ptr(), rows, kv_heads, slots,
        mask.shape[1], scale, softcap or 0.0, torch.get_num_threads(),
    )  # fmt: skip
    if wrong:
        raise BackendError(f"a slot lies outside the {slots} slots of the cache")
    return out


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[-1]))


_library.impl("decode_attention_cpu", decode_attention_cpu, "CPU")
torch.library.register_fake("xkv::decode_attention_cpu", _fake, lib=_library)
