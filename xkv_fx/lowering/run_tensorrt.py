"""Running TensorRT's engine of the decode graph on the buffers of a session.

Not run yet: it needs a GPU that TensorRT or TensorRT-RTX supports.
"""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xkv_fx.errors import EngineError
from xkv_fx.lowering.manifest import Manifest, TensorRTBuild
from xkv_fx.lowering.tensorrt import ENGINE, caches_of


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
        caches = set(caches_of(manifest.plan))
        if set(aliases.values()) != caches:
            wrong = ", ".join(sorted(caches ^ set(aliases.values())))
            raise EngineError(f"{path}: the caches that it changes in place are not those of the plan: {wrong}")
        outputs = [name for name in _tensors(self._engine, tensorrt.TensorIOMode.OUTPUT) if name not in aliases]
        if len(outputs) != 1:
            raise EngineError(f"{path}: it has {len(outputs)} outputs besides its caches, not one")
        self._aliases = aliases
        self._output = outputs[0]
        self._shape = (manifest.batch_size, 1, manifest.vocabulary)
        self._dtype = _torch_dtype(self._engine.get_tensor_dtype(self._output), tensorrt)
        self._context = self._engine.create_execution_context()

    def __call__(self, inputs: list[Tensor]) -> Tensor:
        given = dict(zip(self._names, inputs, strict=True))
        logits = torch.empty(self._shape, dtype=self._dtype, device=inputs[0].device)
        for name, tensor in given.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        for output, cache in self._aliases.items():
            self._context.set_tensor_address(output, given[cache].data_ptr())
        self._context.set_tensor_address(self._output, logits.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise EngineError("TensorRT did not run the decode step; what it logged says why")
        given["seen"] += 1  # `tensorrt_form` leaves it to the caller
        return logits


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
