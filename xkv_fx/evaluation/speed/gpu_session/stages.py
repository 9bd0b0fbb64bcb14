"""The stages of a session, the most worthwhile first. Each runs in a process of its own, since a fault on a GPU ends
all that its process does there."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import xkv_fx
from xkv_fx.errors import XkvError
from xkv_fx.evaluation.dtypes import dtype_of
from xkv_fx.evaluation.machine import describe_machine, seconds
from xkv_fx.evaluation.speed.contestants import Contestant, Ours, dynamic, static
from xkv_fx.evaluation.speed.gpu_bench import WARM_STEPS, GpuBenchSettings, beyond_caches, copy_run, largest_run
from xkv_fx.evaluation.speed.gpu_session.calls import DecodeCall
from xkv_fx.evaluation.speed.gpu_session.record import Record
from xkv_fx.evaluation.speed.gpu_session.sizes import Sizes
from xkv_fx.evaluation.speed.presets import random_model
from xkv_fx.evaluation.timing import medians_in_turns
from xkv_fx.formats import SlotFormat
from xkv_fx.hf.capture import layers_of_model
from xkv_fx.public_budgets import Budgets

FRACTION = 0.384
_FORMATS: tuple[SlotFormat, ...] = ("model", "int8", "int4", "fp8")
_HEADS_OF_8B = (32, 8, 128)  # of Llama 3.1 8B and of Qwen3 8B
_EXAMPLE = Path(xkv_fx.__file__).parents[1] / "examples" / "run_engine.py"
_NEW_TOKENS = 8


def machine(record: Record, sizes: Sizes, device: torch.device) -> None:
    """What it is, and how fast it copies."""
    copy, size = copy_run(device)
    taken = statistics.median(seconds(copy, device) for _ in range(sizes.rounds + 1))
    record.add(**describe_machine(device), triton=_triton_version(), copy_bytes_per_second=size / taken)


def kernels(record: Record, sizes: Sizes, device: torch.device) -> None:
    """Our kernels against plain torch in float32 on the same numbers: the output's error relative to its norm, and
    whether the token was written alike, to the bit."""
    torch.manual_seed(0)
    for dtype in map(dtype_of, sizes.dtypes):
        for heads in sizes.heads:
            for slots in sizes.kernel_slots:
                for name in _FORMATS:
                    call = DecodeCall.random(heads, 2, slots, dtype, name, device)
                    ours, exact = call.copied(), call.copied(torch.float32)
                    out, expected = ours.by_kernel().float(), exact.by_torch()
                    written = all(
                        torch.equal(part, other.to(part.dtype))
                        for part, other in zip(ours.buffers, exact.buffers, strict=True)
                    )
                    error = float((out - expected).norm() / expected.norm())
                    record.add(
                        format=name, dtype=str(dtype), heads=list(heads), slots=slots, error=error, written=written
                    )


def models(record: Record, sizes: Sizes, device: torch.device) -> None:
    """A tiny model: with full budgets the tokens of transformers, in two sessions that are decoded in turns."""
    model = random_model("tiny", torch.float32, device)
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0)).to(device)
    options: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": False}
    given = {"attention_mask": torch.ones_like(ids), **options}
    generate: Any = model.generate  # its type says that a model has none
    expected = generate(ids, **given)
    tokens = ids.shape[1] + _NEW_TOKENS
    full = Budgets((tokens, tokens), xkv_fx.Policy(eviction="none"))
    source = xkv_fx.transform(model, full, batch_size=2, backend=sizes.backend)
    for name in _FORMATS:
        llm = source.with_budgets(dataclasses.replace(full, formats=_all(name, 2)))
        generated = llm.generate(ids, **given)
        sessions = [llm.new_session() for _ in range(2)]
        logits = [session.feed(ids, None, None, all_logits=False) for session in sessions]
        turns = [session.step(expected[:, 40:41], None) for session in sessions]
        alike = torch.equal(*logits) and torch.equal(*turns)
        with torch.no_grad():
            exact = model(expected[:, :41]).logits[:, -1:]
        error = float((turns[0] - exact).norm() / exact.norm())
        same = float((generated == expected)[:, 40:].float().mean())
        lowered = [line.strip() for line in llm.describe().splitlines() if "layers by" in line]
        record.add(format=name, same_tokens=same, sessions_alike=alike, error=error, lowered=lowered)


def attention(record: Record, sizes: Sizes, device: torch.device) -> None:
    """Decode attention at the shapes of 8B models, as a share of the speed at which the device copies; over as many
    layers as no cache of the device holds."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for slots in sizes.attention_contexts:
        for rows in sizes.attention_rows:
            for name in _FORMATS:
                first = DecodeCall.random(_HEADS_OF_8B, rows, slots, dtype, name, device)
                layers = max(1, beyond_caches(device) // first.bytes_read)
                calls = [first, *(first.copied() for _ in range(layers - 1))]
                copy, copied = copy_run(device)
                attend = _recorded(calls) if device.type == "cuda" else first.by_torch
                medians = medians_in_turns({"attend": attend, "copy": copy}, sizes.rounds, device)
                each = medians["attend"] / (layers if device.type == "cuda" else 1)
                speed, copy_speed = first.bytes_read / each * 1e3, copied / medians["copy"] * 1e3
                record.add(
                    format=name, slots=slots, rows=rows, milliseconds=each, bytes=first.bytes_read,
                    bytes_per_second=speed, share_of_copy=speed / copy_speed,
                )  # fmt: skip
                del first, calls, copy, attend
                _release(device)


def steps(record: Record, sizes: Sizes, device: torch.device) -> None:
    """Whole decode steps at the largest batch that fits, ours and transformers'."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(sizes.preset, dtype, device)
    layers, most = len(layers_of_model(model)), sizes.context + sizes.steps + WARM_STEPS + 1
    kept = max(1, round(sizes.context * FRACTION))
    plans = {
        "full": Budgets.full(layers, most),
        f"{FRACTION:.1%}": Budgets.uniform(layers, kept),
        f"int4 at {FRACTION:.1%}": dataclasses.replace(Budgets.uniform(layers, kept), formats=_all("int4", layers)),
        "int8": dataclasses.replace(Budgets.full(layers, most), formats=_all("int8", layers)),
        "int4": dataclasses.replace(Budgets.full(layers, most), formats=_all("int4", layers)),
    }
    settings = GpuBenchSettings(sizes.context, (FRACTION,), sizes.steps, 1, sizes.rows, sizes.backend == "inductor")

    def ours(name: str) -> Callable[[int], Contestant]:
        def make(rows: int) -> Contestant:
            llm = xkv_fx.transform(model, plans[name], batch_size=rows, backend=sizes.backend, check=False)
            return Ours(name, model, llm)

        return make

    makers = {name: ours(name) for name in plans}
    makers["transformers, dynamic"] = lambda rows: dynamic(model, rows)
    if settings.compiled:
        makers["transformers, static"] = lambda rows: static(model, rows, most)
    first: float | None = None
    for name, make in makers.items():
        row_bytes = plans.get(name, plans["full"]).kv_bytes(model)
        run = largest_run(name, make, row_bytes, settings, device)
        first = run.tokens_per_second if first is None else first
        ratio = None if not (first and run.tokens_per_second) else run.tokens_per_second / first
        record.add(
            **{name: value for name, value in dataclasses.asdict(run).items() if value is not None}, to_full=ratio
        )


def prefill(record: Record, sizes: Sizes, device: torch.device) -> None:
    """Prompts of one row: seconds and peak memory, ours at 38.4 % and transformers'."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(sizes.preset, dtype, device)
    layers = len(layers_of_model(model))
    for tokens in sizes.prompts:
        ids = torch.randint(0, 60, (1, tokens), device=device)
        plan = Budgets.uniform(layers, max(1, round(tokens * FRACTION)))
        llm = xkv_fx.transform(model, plan, backend=sizes.backend, check=False)
        for name, contestant in (("ours", Ours("ours", model, llm)), ("transformers", dynamic(model, 1))):
            contestant.prefill(ids)
            _release(device)
            again = functools.partial(contestant.prefill, ids)
            taken = statistics.median(seconds(again, device) for _ in range(3))
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
            record.add(name=name, tokens=tokens, seconds=taken, peak_bytes=peak, kv_bytes=contestant.kv_bytes)


def engine(record: Record, sizes: Sizes, device: torch.device) -> None:
    """An engine of a tiny model generates the same, where neither we nor transformers can be imported."""
    model = random_model("tiny", torch.float32, device)
    llm = xkv_fx.transform(model, Budgets((24, 20)), backend="eager")
    ids = torch.arange(3, 33, device=device)[None]
    mask = torch.ones_like(ids)
    expected = llm.generate(ids, attention_mask=mask, max_new_tokens=_NEW_TOKENS, do_sample=False)[0, 30:].tolist()
    with tempfile.TemporaryDirectory() as folder:
        taken = seconds(lambda: xkv_fx.export(llm, f"{folder}/engine", target=sizes.target), device)
        got, where = _generated(Path(folder) / "engine", ids, sizes)
    record.add(target=sizes.target, same_tokens=got == expected, run=where, export_seconds=taken)
    if got != expected:
        raise XkvError(f"the engine generated {got}, the model {expected}")


def _generated(folder: Path, ids: Tensor, sizes: Sizes) -> tuple[list[int], str]:
    """The new tokens, and where they were made."""
    if sizes.target != "aoti" or not _EXAMPLE.is_file():
        found = xkv_fx.load(folder, trust=True).generate(ids, _NEW_TOKENS)
        return found[0, ids.shape[1] :].tolist(), "in this process"
    prompt = ",".join(map(str, ids[0].tolist()))
    command = [sys.executable, "-I", str(_EXAMPLE), str(folder), prompt, "--new", str(_NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise XkvError(f"the engine did not run by itself: {done.stderr.strip()[-300:]}")
    return [int(token) for token in done.stdout.strip().split(",")], "in a process of its own, with torch alone"


def _recorded(calls: Sequence[DecodeCall]) -> Callable[[], Any]:
    """A CUDA graph of the calls, since launching from Python takes longer than one row's attention."""
    for call in calls:
        call.by_kernel()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call.by_kernel()
    return graph.replay


def _all(name: SlotFormat, layers: int) -> tuple[tuple[SlotFormat, SlotFormat], ...]:
    return ((name, name),) * layers


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    version: str = triton.__version__
    return version


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


STAGES: dict[str, Callable[[Record, Sizes, torch.device], None]] = {
    stage.__name__: stage for stage in (machine, kernels, models, attention, steps, prefill, engine)
}
