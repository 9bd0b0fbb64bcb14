"""Running TensorRT's engine of the decode graph on the buffers of a session.

Not run yet: it needs a GPU that TensorRT or TensorRT-RTX supports.
"""

from __future__ import annotations

import functools
import importlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xkv_fx.engines.manifest import Manifest
from xkv_fx.engines.records import TensorRTBuild
from xkv_fx.engines.tensorrt.build import ENGINE, caches_of, returned_by, written_in_place
from xkv_fx.errors import EngineError
from xkv_fx.runtime.state import CachePlan


def check_library(build: TensorRTBuild) -> Any:
    """The library that built the engine.

    Raises:
        EngineError: it is not installed, or of another version.
    """
    try:
        tensorrt = importlib.import_module(build.library)
    except ImportError as error:
        wanted = f"{build.library.replace('_', '-')}=={build.version}"
        raise EngineError(f"it was built by TensorRT, which is not installed here; install {wanted}") from error
    if tensorrt.__version__ != build.version:
        raise EngineError(
            f"it was built by {build.library} {build.version}, and this is {tensorrt.__version__}; export it again"
        )
    return tensorrt


class TensorRTDecode:
    """Called as every package is: `(ids, position_ids, *state)`; the state is changed in place, by TensorRT and, what
    counts the tokens, here."""

    def __init__(self, path: Path, manifest: Manifest, build: TensorRTBuild) -> None:
        tensorrt = check_library(build)
        self._names = [spec.name for spec in manifest.packages["decode"].inputs]
        logger = tensorrt.Logger(tensorrt.Logger.WARNING)
        self._runtime = tensorrt.Runtime(logger)
        with zipfile.ZipFile(path) as archive:
            self._engine = self._runtime.deserialize_cuda_engine(archive.read(f"{path.stem}/{ENGINE}"))
        if self._engine is None:
            raise EngineError(f"{path}: TensorRT could not load it; what it logged says why")
        aliases = _aliases(self._engine, tensorrt)
        self._plan = manifest.plan
        caches = set(caches_of(self._plan)) if written_in_place(self._plan) else set()
        if set(aliases.values()) != caches:
            wrong = ", ".join(sorted(caches ^ set(aliases.values())))
            raise EngineError(f"{path}: the caches that it changes in place are not those of the plan: {wrong}")
        self._aliases = aliases
        parts = returned_by(self._plan)
        returned = ("logits", *(part.name for part in parts))
        self._outputs = {name: f"output{index}" for index, name in enumerate(returned)}  # as Torch-TensorRT names them
        found = {name for name in _tensors(self._engine, tensorrt.TensorIOMode.OUTPUT) if name not in aliases}
        if found != set(self._outputs.values()):
            raise EngineError(f"{path}: it returns {len(found)} tensors besides its caches, not {len(returned)}")
        logits = _torch_dtype(self._engine.get_tensor_dtype(self._outputs["logits"]), tensorrt)
        self._shapes = {
            "logits": ((manifest.batch_size, 1, manifest.vocabulary), logits),
            **{part.name: (part.shape, part.dtype) for part in parts},
        }
        self._context = self._engine.create_execution_context()

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        given = dict(zip(self._names, inputs, strict=True))
        device = inputs[0].device
        returned = {
            name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in self._shapes.items()
        }
        for name, tensor in given.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        for output, cache in self._aliases.items():
            self._context.set_tensor_address(output, given[cache].data_ptr())
        for name, output in self._outputs.items():
            self._context.set_tensor_address(output, returned[name].data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise EngineError("TensorRT did not run the decode step; what it logged says why")
        if not self._aliases:
            write_returned(self._plan, given, returned)
        given["seen"] += 1  # `tensorrt_form` leaves it to the caller
        return returned["logits"]


def write_returned(plan: CachePlan, state: Mapping[str, Tensor], returned: Mapping[str, Tensor]) -> None:
    """Write what a decode step returned into the buffers that it has read, where it does not write them itself.

    Args:
        state: by the names of `CachePlan.names`; tokens are not counted yet.
        returned: by the names of `tensorrt.returned_by`.
    """
    counts = {buffer.field: state[buffer.name] for buffer in plan.counters.buffers}
    slot = functools.cache(lambda slots: slots.next_slot(counts["seen"], counts["base"]))  # equal layers, equal slots
    for cache in plan.caches:
        held = {buffer.field: state[buffer.name] for buffer in cache.buffers}
        parts = {part.field: returned[part.name] for part in cache.returned_parts()}
        cache.write_returned(held, parts, counts["seen"], slot)


def _tensors(engine: Any, mode: Any) -> list[str]:
    names = (engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def _aliases(engine: Any, tensorrt: Any) -> dict[str, str]:
    """Which outputs lie where an input does."""
    outputs = _tensors(engine, tensorrt.TensorIOMode.OUTPUT)
    found = {name: engine.get_aliased_input_tensor(name) for name in outputs}
    return {name: aliased for name, aliased in found.items() if aliased}


def _torch_dtype(dtype: Any, tensorrt: Any) -> torch.dtype:
    return {
        tensorrt.float32: torch.float32,
        tensorrt.float16: torch.float16,
        tensorrt.bfloat16: torch.bfloat16,
    }[dtype]
