"""Compiling our C++ for CPUs, by the compiler and into the cache on disk that Inductor uses."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import threading
from collections.abc import Sequence

import torch

from xkv_fx.errors import BackendError, first_line
from xkv_fx.runtime.quantize import Coding

DTYPES = {torch.float32: "DTYPE_FLOAT32", torch.bfloat16: "DTYPE_BFLOAT16", torch.float16: "DTYPE_FLOAT16"}
STEP = 16
"""Dimensions that kernels sum over are multiples of this."""
# The numbers of c10::ScalarType, which no release may change: tensors are saved by them.
_SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}

_SHARED = {
    "ops_cpu.cpp": ("decode.h",),
    "decode_cpu.cpp": ("decode.h", "lanes.h", "softmax.h"),
    "decode_coded_cpu.cpp": ("decode.h", "lanes.h", "softmax.h", "codes.h", "quads.h"),
    "linear_cpu.cpp": ("lanes.h",),
}
"""What sources need before them."""
_WIDEST = 16
"""Numbers of the longest vectors in `lanes.h`."""

VECTORS_AS_TORCH = {"cpp.vec_isa_ok": True}
"""A setting of Inductor: it uses the vectors that torch itself uses on this processor. Otherwise it compiles several
programs just to see whether the compiler knows their instructions, which takes longer than our kernels do; every
compiler that is new enough for torch's headers knows them."""

_building = threading.Lock()
library = torch.library.Library("xkv", "FRAGMENT")
TAGS = (torch.Tag.flexible_layout,)
"""Operators take inputs in any layout. Without this Inductor copies the mask for every layer that reads one."""


def build_kernel(
    source: str,
    function: str,
    dtype: torch.dtype,
    group: int = 0,
    key_dim: int = 0,
    value_dim: int = 0,
    int8: bool = False,
    codings: Sequence[Coding | None] = (None, None),
    lacking: Sequence[str] = (),
) -> None:
    """Compile a kernel, or load it from the cache on disk, and hand it to the operators.

    Args:
        source: a file beside this one.
        function: what the operators call.
        dtype: one of `DTYPES`.
        group, key_dim, value_dim: shapes that it is compiled for, 0 for a kernel that takes any.
        int8: for weights in int8.
        codings: of keys and of values; None for the dtype itself.
        lacking: instructions that are not used though the processor has them, such as `__AVX512VNNI__`; for tests.

    Raises:
        BackendError: there is no C++ compiler, or it refuses the kernel.
    """
    shape = {"GROUP": group, "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "INT8_WEIGHTS": int(int8), DTYPES[dtype]: 1}
    shape |= _coded(codings, (key_dim, value_dim)) if any(codings) else {}
    bits = [0 if coding is None else coding.bits for coding in codings]
    with _building:
        operators = _operators()
        kernel = _compiled(source, tuple(shape.items()), lacking)
        made = ctypes.cast(getattr(kernel, function), ctypes.c_void_p)
        operators.xkv_hand_in(_SCALAR_TYPES[dtype], group, key_dim, value_dim, int8, *bits, made)


def _coded(codings: Sequence[Coding | None], dims: Sequence[int]) -> dict[str, int]:
    """What is defined for slots of fewer bits. Vectors are as long as the machine allows, unless numbers in the dtype
    would not fill them."""
    defined = {"CODED": 1}
    for name, coding in zip(("KEY", "VALUE"), codings, strict=True):
        bits, group = (0, 0) if coding is None else (coding.bits, coding.group)
        defined |= {f"{name}_BITS": bits, f"{name}_SPAN": group}
    whole = all(dim % _WIDEST == 0 for dim, coding in zip(dims, codings, strict=True) if coding is None)
    return defined | {"WIDE_LANES": int(whole)}


@functools.cache
def _operators() -> ctypes.CDLL:
    operators = _compiled("ops_cpu.cpp")
    ctypes.CDLL(operators._name, ctypes.RTLD_GLOBAL)  # compiled code finds its functions by their names
    operators.xkv_hand_in.argtypes = [*[ctypes.c_int64] * 7, ctypes.c_void_p]
    operators.xkv_hand_in.restype = None
    return operators


def _compiled(source: str, defined: tuple[tuple[str, int], ...] = (), undefined: Sequence[str] = ()) -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache  # loads the compiler, not needed just to run graphs

    texts = [importlib.resources.files(__package__).joinpath(file).read_text() for file in (*_SHARED[source], source)]
    macros = [*(f"#undef {name}" for name in undefined), *(f"#define {name} {value}" for name, value in defined)]
    text = "\n".join([*macros, *texts])
    try:
        with torch._inductor.config.patch(VECTORS_AS_TORCH):
            compiled: ctypes.CDLL = CppCodeCache.load(text, extra_flags=("-ffp-contract=fast",))
    except Exception as error:
        raise BackendError(
            f"the CPU kernels could not be built ({first_line(error)}); they need a C++ compiler"
        ) from error
    return compiled
