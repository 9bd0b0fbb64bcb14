"""Models that transformers has split among processes (`tp_plan`): each captures its own part, collectives and all.

transformers gives the layers of such a model forwards of its own, which move between DTensors and plain tensors and
cannot be exported. A copy of the model gets ours in their place: plain tensors, which are the shards themselves, and
functional collectives, which a graph can hold. So a graph has this process's query and KV heads, and the hidden states
of the whole model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from xkv_fx.capture.facts import UNSHARDED, Shard
from xkv_fx.errors import UnsupportedModelError

c10d = torch.ops._c10d_functional
_KEYS = re.compile(r"(k_proj|qkv_proj|query_key_value)$")


@dataclasses.dataclass(frozen=True)
class Shards(Shard):
    """A part of a model, and the group of processes that have the others."""

    group_name: str = ""

    def summed(self, partial: Tensor) -> Tensor:
        """The sum over the processes."""
        total: Tensor = c10d.wait_tensor(c10d.all_reduce(partial.contiguous(), "sum", self.group_name))
        return total

    def gathered(self, part: Tensor, width: int) -> Tensor:
        """The parts of all processes side by side along the last dimension, `width` together."""
        missing = self.chunk(width) - part.shape[-1]
        part = nn.functional.pad(part, (0, missing)).movedim(-1, 0).contiguous()
        parts: Tensor = c10d.wait_tensor(c10d.all_gather_into_tensor(part, self.size, self.group_name))
        return parts[:width].movedim(0, -1).contiguous()

    def all_heads(self, states: Tensor) -> Tensor:
        return self.gathered(states.movedim(1, -1), states.shape[1] * self.size).movedim(-1, 1)

    def chunk(self, width: int) -> int:
        """The size of a part of `width`; the last ones may have less."""
        return -(-width // self.size)


def shard_of(model: PreTrainedModel) -> Shard:
    """Which part of a model that is split among processes this one has: `Shards`; `UNSHARDED` if it is whole.

    Raises:
        UnsupportedModelError: it is split in a way that is not taken.
    """
    weights: list[Any] = [weight for weight in (*model.parameters(), *model.buffers()) if _is_sharded(weight)]
    meshes = {weight.device_mesh for weight in weights}
    if not meshes:
        return UNSHARDED
    name = type(model).__name__
    size = getattr(model, "tp_size", None) or 1
    mesh = next(iter(meshes))
    if len(meshes) > 1 or mesh.ndim != 1 or mesh.size() != size:
        raise UnsupportedModelError(
            f"{name} cannot be captured: its weights are DTensors, but not by a tensor-parallel plan of transformers "
            "alone; load it with from_pretrained(..., distributed_config=DistributedConfig(tp_plan='auto')), without "
            "FSDP, expert or pipeline parallelism"
        )
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", size)
    splits_keys = any(style == "colwise" and _KEYS.search(rule) for rule, style in (model.tp_plan or {}).items())
    if splits_keys and isinstance(heads, int) and heads % size:
        raise UnsupportedModelError(
            f"{name} cannot be captured: its {heads} KV heads cannot be split evenly among {size} processes; choose a "
            "tp_size that divides them"
        )
    return Shards(mesh.get_local_rank(), size, mesh.get_group().group_name)


def use_shards(twin: PreTrainedModel, shards: Shard) -> PreTrainedModel:
    """Let a copy of a model that is split compute with its shards as plain tensors, which are not copied.

    Args:
        shards: of the model; a whole one stays as it is.

    Raises:
        UnsupportedModelError: a layer is split in a way that is not taken.
    """
    if not isinstance(shards, Shards):
        return twin
    for path, module in twin.named_modules():
        sharded = {name for name, weight in module.named_parameters(recurse=False) if _is_sharded(weight)}
        if "forward" not in vars(module) and not sharded:
            continue
        style = _style(path, sharded, twin.tp_plan or {})
        install = _STYLES.get(style)
        if install is None:
            raise UnsupportedModelError(
                f"{type(twin).__name__} cannot be captured: {path} is split among processes by the style {style!r}; "
                f"those that are taken are {', '.join(sorted(_STYLES))}"
            )
        vars(module).pop("forward", None)  # transformers', which runs the modules of the user's model
        for name in sharded:
            local = module.get_parameter(name).to_local()
            module.register_parameter(name, nn.Parameter(local, requires_grad=False))
        install(module, shards)
    return twin


def _style(path: str, sharded: set[str], plan: dict[str, str]) -> str:
    """The parallel style of a module's output, or that of its parameters where only they have one."""
    rule = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    styles = [plan[rule]] if rule in plan else [plan.get(f"{rule}.{name}", "none") for name in sorted(sharded)]
    return styles[0] if styles else "none"


def _local(module: nn.Module, shards: Shards) -> None:
    """The output is this process's part of the features, or the same on every process."""


def _gathering(module: nn.Module, shards: Shards) -> None:
    _wrap(module, lambda forward, x: shards.gathered(forward(x), int(module.out_features)))  # type: ignore[arg-type]


def _summing(module: nn.Module, shards: Shards) -> None:
    """Each process has some of the input's features; the bias is added once."""
    bias = module._parameters.get("bias")
    if bias is None:
        _wrap(module, lambda forward, x: shards.summed(forward(x)))
        return
    module.register_parameter("bias", None)
    module.register_parameter("bias_of_sum", bias)
    _wrap(module, lambda forward, x: shards.summed(forward(x)) + module.get_parameter("bias_of_sum"))


def _splitting(module: nn.Module, shards: Shards) -> None:
    """As `_summing`, where each process has all of the input's features."""
    _summing(module, shards)
    chunk = shards.chunk(int(module.in_features))  # type: ignore[arg-type]
    _wrap(module, lambda forward, x: forward(x[..., shards.rank * chunk : (shards.rank + 1) * chunk]))


def _looking_up(module: nn.Module, shards: Shards) -> None:
    """Each process has the vectors of some tokens."""
    count = module.get_parameter("weight").shape[0]
    first = shards.rank * shards.chunk(int(module.num_embeddings))  # type: ignore[arg-type]
    vars(module)["padding_idx"] = None  # of gradients alone

    def look_up(forward: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        index = ids - first
        elsewhere = (index < 0) | (index >= count)
        vectors = forward(index.masked_fill(elsewhere, 0)).masked_fill(elsewhere[..., None], 0.0)
        return shards.summed(vectors)

    _wrap(module, look_up)


_STYLES: dict[str, Callable[[nn.Module, Shards], None]] = {
    "colwise": _local,
    "colwise_gather_output": _gathering,
    "colwise_rep": _gathering,
    "embedding_rowwise": _looking_up,
    "local_params": _local,
    "packed_colwise": _local,
    "replicate": _local,
    "replicated_with_grad_allreduce": _local,
    "rowwise": _summing,
    "rowwise_split_input": _splitting,
}


def _wrap(module: nn.Module, around: Callable[..., Tensor]) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: around(forward, *args, **kwargs)


def _is_sharded(tensor: Any) -> bool:
    return dist.is_available() and isinstance(tensor, dist.tensor.DTensor)
