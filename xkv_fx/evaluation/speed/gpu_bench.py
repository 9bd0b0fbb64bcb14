"""Decode on a GPU against its memory: `python -m xkv_fx.evaluation.speed.gpu_bench --preset llama-3.1-8b`.

Measured on a model of random weights whose caches are filled with random numbers, at one context length:

attention   our decode attention over K/V kept in full and in part, as a share of the speed at which the device copies
throughput  decoded tokens a second at the largest batch that fits: ours with full caches and at each fraction,
            transformers' DynamicCache, and its StaticCache compiled with CUDA graphs

The result is JSON with the keys `runs`, `ratios` and `machine`. Where there is no GPU it says "not measured"; on a CPU
the preset `tiny` shows that the program runs, and its figures say nothing about a GPU.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

import xkv_fx
from xkv_fx.errors import BackendError, BudgetError
from xkv_fx.evaluation.machine import available_bytes, describe_machine, seconds
from xkv_fx.evaluation.speed.bench_result import Run
from xkv_fx.evaluation.speed.contestants import Contestant, Ours, dynamic, static
from xkv_fx.evaluation.speed.presets import PRESETS, random_model
from xkv_fx.evaluation.timing import medians_in_turns
from xkv_fx.hf.capture import layers_of_model
from xkv_fx.layers import LayerSpec
from xkv_fx.public_budgets import Budgets
from xkv_fx.runtime import ops  # noqa: F401  (registers the ops)

NOT_MEASURED = "not measured"
RATIOS = (
    "attention_share_of_copy_speed",
    "throughput_to_full",
    "throughput_to_dynamic_cache",
    "throughput_to_static_cache",
    "fraction_of_5.5_times_full",
)
WARM_STEPS = 4  # kernels are loaded, and CUDA graphs recorded
RANDOM_TOKENS = "caches filled with random numbers, weights random: speed only, no quality"


@dataclasses.dataclass(frozen=True)
class GpuBenchSettings:
    """What is measured.

    Attributes:
        context: tokens that every row has seen.
        fractions: shares of the context that ours keeps in every layer.
        steps, rounds: decoded tokens that are timed, and repetitions of each attention.
        rows: of the batch; the most that fit when None.
        compiled: ours by Inductor, and a static cache by `torch.compile`; else ours eager, and no static cache.
    """

    context: int
    fractions: tuple[float, ...]
    steps: int
    rounds: int
    rows: int | None
    compiled: bool

    def check(self, model: PreTrainedModel) -> None:
        """
        Raises:
            BudgetError: sizes out of range.
        """
        positions = model.config.max_position_embeddings
        last = self.context + self.steps + WARM_STEPS
        if min(self.context, self.steps, self.rounds, 1 if self.rows is None else self.rows) < 1 or last > positions:
            raise BudgetError(
                f"context, steps, rounds and batch must be at least 1, and {last} tokens fit into {positions} positions"
            )
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise BudgetError(f"fractions must lie above 0 and not above 1; got {list(self.fractions)}")
        if self.rows is None and model.device.type != "cuda":
            raise BudgetError("how many rows fit is only known on a GPU; give --batch")


def kept_slots(settings: GpuBenchSettings, fraction: float) -> int:
    return max(1, round(settings.context * fraction))


# Attention


def attention_runs(
    spec: LayerSpec, settings: GpuBenchSettings, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """Attention of one token a row, in turns with a copy, for one row and for as many as hold enough to fill a GPU."""
    runs = []
    for rows in dict.fromkeys((1, settings.rows or 16)):
        for slots in dict.fromkeys((settings.context, *(kept_slots(settings, part) for part in settings.fractions))):
            attend, size = _attention(spec, rows, slots, dtype, device)
            copy, copied = copy_run(device)
            medians = medians_in_turns({"attend": attend, "copy": copy}, settings.rounds, device)
            speed, copy_speed = size / medians["attend"] * 1e3, copied / medians["copy"] * 1e3
            runs.append(
                {
                    "name": "decode-attention", "rows": rows, "slots": slots, "bytes": size,
                    "bytes_per_second": speed, "copy_bytes_per_second": copy_speed, "share": speed / copy_speed,
                }
            )  # fmt: skip
            del attend, copy
            _release(device)
    return runs


def _attention(
    spec: LayerSpec, rows: int, slots: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], Any], int]:
    """Attention over the buffers of as many layers as no cache of the device holds, and the bytes of K/V read."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    q = random(rows, spec.query_heads, 1, spec.key_dim)
    k, v = random(rows, spec.kv_heads, 1, spec.key_dim), random(rows, spec.kv_heads, 1, spec.value_dim)
    size = rows * slots * spec.slot_bytes(dtype)
    layers = max(1, beyond_caches(device) // size)
    buffers = [
        (random(rows, spec.kv_heads, slots, spec.key_dim), random(rows, spec.kv_heads, slots, spec.value_dim))
        for _ in range(layers)
    ]
    slot, scale = torch.full((rows,), slots - 1, device=device), spec.key_dim**-0.5
    mask = torch.zeros(rows, 1, 1, slots, dtype=dtype, device=device)
    if device.type != "cuda":

        def attend_by_torch() -> None:
            for pair in buffers:
                torch.ops.xkv.decode_attention(q, k, v, *pair, slot, mask, scale)

        return attend_by_torch, layers * size
    from xkv_fx.runtime.kernels import decode_triton

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    launch = decode_triton.plan_launch(rows, spec.kv_heads, slots, spec.key_dim, spec.value_dim, dtype, processors)
    count = torch.full((rows,), slots, device=device)

    def attend() -> None:
        for pair in buffers:
            torch.ops.xkv.decode_attention_triton(
                q, k, v, *pair, slot, mask, count, scale, None, None, **dataclasses.asdict(launch)
            )

    attend()
    graph = torch.cuda.CUDAGraph()  # launching from Python takes longer than one row's attention
    with torch.cuda.graph(graph):
        attend()
    return graph.replay, layers * size


def copy_run(device: torch.device) -> tuple[Callable[[], Any], int]:
    """A copy within the device's memory, and the bytes that it reads and writes."""
    source = torch.ones(beyond_caches(device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.numel()


def beyond_caches(device: torch.device) -> int:
    """Bytes that no cache of the device holds."""
    return (512 if device.type == "cuda" else 16) * 1024 * 1024


# Throughput


def throughput_runs(model: PreTrainedModel, settings: GpuBenchSettings) -> list[Run]:
    """A run of everybody, one after another; nobody's memory is left when the next one starts."""
    layers, most = len(layers_of_model(model)), settings.context + settings.steps + WARM_STEPS + 1
    full = Budgets.full(layers, most)
    plans = {"full": full}
    for fraction in settings.fractions:
        plans[f"ours-{fraction}"] = Budgets.uniform(layers, kept_slots(settings, fraction))
    backend = "inductor" if settings.compiled else "eager"

    def ours(name: str, rows: int) -> Contestant:
        llm = xkv_fx.transform(model, plans[name], batch_size=rows, backend=backend, check=False)
        return Ours(name, model, llm)

    makers: dict[str, Callable[[int], Contestant]] = {
        **{name: lambda rows, name=name: ours(name, rows) for name in plans},  # type: ignore[misc]
        "dynamic": lambda rows: dynamic(model, rows),
    }
    if settings.compiled:
        makers["static"] = lambda rows: static(model, rows, most)
    runs = []
    for name, make in makers.items():
        plan = plans.get(name, full)
        runs.append(largest_run(name, make, plan.kv_bytes(model, batch_size=1), settings, model.device))
    return runs


def largest_run(
    name: str, make: Callable[[int], Contestant], row_bytes: int, settings: GpuBenchSettings, device: torch.device
) -> Run:
    """The run of the largest batch that fits, from the one that memory has room for downwards."""
    rows = settings.rows or (available_bytes(device) or 0) // row_bytes
    while rows >= 1:
        try:
            return _decode(name, make(rows), settings, device)
        except (torch.OutOfMemoryError, BudgetError, BackendError) as error:
            if settings.rows is not None or not _out_of_memory(error):
                raise
        _release(device)
        torch._dynamo.reset()
        rows -= max(1, rows // 20)
    return Run(name, 0, settings.context, skipped="not one row fits")


def _decode(name: str, contestant: Contestant, settings: GpuBenchSettings, device: torch.device) -> Run:
    contestant.fill(settings.context)
    with torch._inductor.config.patch({"triton.cudagraphs": device.type == "cuda"}):  # for the static cache
        for _ in range(WARM_STEPS):
            contestant.step()
    times = [seconds(contestant.step, device) for _ in range(settings.steps)]
    run = Run.of_steps(
        name,
        contestant.rows,
        settings.context,
        times,
        filled=True,
        kv_bytes=contestant.kv_bytes,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )
    del contestant
    _release(device)
    return run


def _out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return True
        error = error.__cause__
    return False


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# The result


def ratios_of(attention: list[dict[str, Any]], runs: list[Run]) -> dict[str, Any]:
    """What compares the runs; `NOT_MEASURED` for what there is nothing of."""
    speeds = {run.name: run.tokens_per_second for run in runs if run.tokens_per_second}

    def over(base: str) -> Any:
        against = speeds.get(base)
        if against is None:
            return NOT_MEASURED
        return {name: speed / against for name, speed in speeds.items() if name.startswith("ours-")} or NOT_MEASURED

    to_full = over("full")
    enough = []
    if to_full != NOT_MEASURED:
        enough = [float(name.removeprefix("ours-")) for name, ratio in to_full.items() if ratio >= 5.5]
    shares = {f"{run['rows']} rows, {run['slots']} slots": run["share"] for run in attention}
    found = (shares or NOT_MEASURED, to_full, over("dynamic"), over("static"), max(enough, default=NOT_MEASURED))
    return dict(zip(RATIOS, found, strict=True))


def bench(model: PreTrainedModel, settings: GpuBenchSettings) -> dict[str, Any]:
    """Measure everything; plain data with the keys `runs`, `ratios`, `machine`, `settings` and `note`.

    Raises:
        BudgetError: sizes out of range.
    """
    settings.check(model)
    device, dtype = model.device, model.dtype
    attention = attention_runs(layers_of_model(model)[0], settings, dtype, device)
    runs = throughput_runs(model, settings)
    return {
        "runs": [*attention, *(dataclasses.asdict(run) for run in runs)],
        "ratios": ratios_of(attention, runs),
        "machine": {**describe_machine(device), "dtype": str(dtype).removeprefix("torch.")},
        "settings": dataclasses.asdict(settings),
        "note": RANDOM_TOKENS,
    }


def main(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}; weights are random.")] = "llama-3.1-8b",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the program.")] = "cuda",
    context: Annotated[int, typer.Option(help="Tokens that every row has seen.")] = 32_768,
    fraction: Annotated[list[float] | None, typer.Option(help="Share of the context kept; repeat for more.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows; the most that fit when not given.")] = None,
    steps: Annotated[int, typer.Option(help="Decoded tokens that are timed.")] = 32,
    rounds: Annotated[int, typer.Option(help="Repetitions of each attention.")] = 15,
    compiled: Annotated[bool, typer.Option(help="Compile ours, and run the static cache.")] = True,
    output: Annotated[Path | None, typer.Option(help="Where the JSON goes; standard output when not given.")] = None,
) -> None:
    """Decode on a GPU against its memory, as JSON."""
    if device == "cuda" and not torch.cuda.is_available():
        found: dict[str, Any] = {
            "runs": [],
            "ratios": dict.fromkeys(RATIOS, NOT_MEASURED),
            "machine": describe_machine(torch.device("cpu")),
            "note": f"{NOT_MEASURED}: no GPU that torch can use",
        }
    else:
        where = torch.device(device)
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        settings = GpuBenchSettings(context, tuple(fraction or [0.384]), steps, rounds, batch, compiled)
        found = bench(random_model(preset, dtype, where), settings)
    text = json.dumps(found, indent=2)
    if output is None:
        sys.stdout.write(text + "\n")
    else:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
