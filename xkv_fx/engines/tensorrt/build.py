"""TensorRT: the decode graph becomes one engine of TensorRT's that updates the caches in place where it can.

What was hoped for is checked in the network that is built: every cache is updated by a layer of TensorRT's own, which
aliases its input, and nothing is left to torch. Torch-TensorRT converts; `torch-tensorrt` and `torch-tensorrt-rtx` both
serve. Neither is imported before it is needed, and neither can be on a machine without a GPU.
"""

from __future__ import annotations

import collections
import importlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from xkv_fx.engines.form import KEY_FILE
from xkv_fx.engines.records import TensorRTBuild
from xkv_fx.errors import BackendError, EngineError, first_line
from xkv_fx.runtime.state import Buffer, CachePlan

ENGINE = "engine"
"""Under this name the decode package, a zip file, holds what TensorRT built; beside it `form.KEY_FILE`."""

_INSTALL = "install torch-tensorrt-rtx (for RTX GPUs) or torch-tensorrt, of the version of the installed torch"


def compile_tensorrt(program: ExportedProgram, path: Path, key: str, caches: int) -> TensorRTBuild:
    """Build an engine of a traced decode graph for this machine's GPU and write it to `path`.

    Args:
        program: of `trace_for_tensorrt`.
        key: stored in the file.
        caches: how many tensors of K/V must be updated in place; none where the caller writes them.

    Raises:
        as `build_engine`.
    """
    engine, build = build_engine(program, caches)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(f"{path.stem}/{ENGINE}", "w", force_zip64=True) as member:
            member.write(engine)
        archive.writestr(f"{path.stem}/{KEY_FILE}", key)
    return build


def build_engine(
    program: ExportedProgram, caches: int, capabilities: Sequence[str] = ()
) -> tuple[memoryview, TensorRTBuild]:
    """Convert a traced decode graph as a whole, and build it.

    Args:
        program: of `trace_for_tensorrt`; inputs and caches keep their names, the logits are the first output.
        caches: how many tensors of K/V must be updated in place; none where the caller writes them.
        capabilities: GPUs to build for, such as `"sm_89"`, in one engine; TensorRT-RTX alone can. The present GPU when
            empty.

    Raises:
        EngineError: no TensorRT, or it cannot be imported here.
        BackendError: an op that TensorRT has no layer for, a cache that it would not update in place, or a build that
            fails.
    """
    torch_tensorrt = import_torch_tensorrt()
    converted = _convert(program, torch_tensorrt)  # owns the weights, which the network only points to
    builder, network = converted.builder, converted.ctx.net
    kinds = collections.Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    if kinds["KV_CACHE_UPDATE"] != caches:
        raise BackendError(
            f"TensorRT would update {kinds['KV_CACHE_UPDATE']} of {caches} K/V tensors in place; choose the target "
            "'aoti'"
        )
    tensorrt = importlib.import_module("tensorrt")
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # float32 stays float32
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(getattr(tensorrt.ComputeCapability, name.replace("_", "").upper()), index)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError("TensorRT could not build the decode graph; what it logged says why")
    build = TensorRTBuild(
        library=tensorrt.__name__,  # "tensorrt_rtx" too is imported as "tensorrt", by Torch-TensorRT
        version=tensorrt.__version__,
        torch_tensorrt=torch_tensorrt.__version__,
        layers=network.num_layers,
        caches_in_place=kinds["KV_CACHE_UPDATE"],
        native_attentions=kinds["ATTENTION_INPUT"],
    )
    return memoryview(engine), build


def import_torch_tensorrt() -> Any:
    """Torch-TensorRT, whichever TensorRT it is built on.

    Raises:
        EngineError: there is none, or it cannot be imported here.
    """
    try:
        return importlib.import_module("torch_tensorrt")
    except ImportError as error:
        raise EngineError(f"the target 'tensorrt' needs Torch-TensorRT ({first_line(error)}); {_INSTALL}") from error
    except RuntimeError as error:  # it asks for the GPU when it is imported
        raise EngineError(f"Torch-TensorRT cannot be imported here: {first_line(error)}") from error


def caches_of(plan: CachePlan) -> tuple[str, ...]:
    """The tensors of K/V that a decode step changes; keys that are the values too are one."""
    return tuple(buffer.name for buffer in plan.buffers if buffer.holds == "kv" and buffer.nbytes)


def written_in_place(plan: CachePlan) -> bool:
    """Whether TensorRT writes each token's K/V itself: of one row, and not with a slot of its own in each KV head."""
    return plan.rows == 1 and all(slots.eviction != "scored" for slots in plan.slots)


def returned_by(plan: CachePlan) -> tuple[Buffer, ...]:
    """What a decode step returns besides logits for its caller to write, in order."""
    if written_in_place(plan):
        return ()
    parts = (part for cache in plan.caches for part in cache.returned_parts())
    return tuple(sorted(parts, key=lambda part: part.name))


def _convert(program: ExportedProgram, torch_tensorrt: Any) -> Any:
    """The whole program as one network of TensorRT's: `builder`, and `ctx.net`.

    Torch-TensorRT's own entry points load what they have built, which needs the GPU that it was built for.
    """
    from torch_tensorrt.dynamo import CompilationSettings
    from torch_tensorrt.dynamo.conversion import TRTInterpreter
    from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering

    settings = CompilationSettings(
        min_block_size=1,
        require_full_compilation=True,
        decompose_attention=False,  # TensorRT has a layer for it
        attn_bias_is_causal=False,
        immutable_weights=True,
    )
    try:
        with torch.no_grad():
            lowered = pre_export_lowering(program, settings)
            module = lowered.run_decompositions(get_decompositions(decompose_attention=False)).module()
            module = post_lowering(module, settings)
            values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
            inputs = [torch_tensorrt.Input(tuple(value.shape), dtype=value.dtype) for value in values]
            interpreter = TRTInterpreter(module, inputs, compilation_settings=settings)
            torch.fx.Interpreter.run(interpreter, enable_io_processing=False)  # the network; no engine yet
    except Exception as error:  # Torch-TensorRT and TensorRT raise errors of many kinds
        raise BackendError(f"Torch-TensorRT could not convert the decode graph ({first_line(error)})") from error
    return interpreter
