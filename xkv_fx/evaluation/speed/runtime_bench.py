"""What the runtime promises, measured: `python -m xkv_fx.evaluation.speed.runtime_bench COMMAND`.

prefill-memory   live bytes of a long prefill, beside the same forward without any cache
starting         a process from its start to the second token, with nothing compiled, and the next one
first-token      time to the first token, beside transformers' own prefill, in turns
profiling        a prompt of a profile, beside a plain prefill of it
long-session     one session far past its budget: speed, memory, recompiles, NaN
solving          a plan for 80 layers of 131,072 tokens: from gains, and from a profile
decode-attention our CPU kernel, torch's attention and a plain read of the same K/V, in turns

The model is a SmolLM2-135M shape with random weights: none of these figures depends on what a model has learned.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import xkv_fx
from xkv_fx.evaluation.machine import seconds
from xkv_fx.evaluation.speed.live_bytes import peak_bytes
from xkv_fx.evaluation.timing import medians_in_turns, process_seconds
from xkv_fx.planning.solve.fill import fill_by_gain
from xkv_fx.runtime import ops  # noqa: F401  (registers the ops)
from xkv_fx.runtime.kernels import decode_cpu
from xkv_fx.runtime.scorers.base import scorer_names

app = typer.Typer(add_completion=False, help="What the runtime promises, measured.")
LAYERS = 30
Prompt = Annotated[int, typer.Option(help="Tokens in the prompt.")]
Capacity = Annotated[int, typer.Option(help="Slots of each layer.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]


def smollm2_shape(positions: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A model of SmolLM2-135M's shape with random weights and so many positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    shaped: LlamaForCausalLM = model.to(dtype).eval()
    return shaped


def random_prompt(tokens: int) -> Tensor:
    """Token ids, int64 `[1, tokens]`."""
    return torch.randint(49152, (1, tokens), generator=torch.Generator().manual_seed(1))


@app.command()
def prefill_memory(prompt: Prompt = 8000, capacity: Capacity = 3072) -> None:
    """Peak of live tensor bytes above the same forward without a cache; at most the budget and 1.5 layers' full K/V."""
    model, ids = smollm2_shape(prompt + 64), random_prompt(prompt)
    budgets = xkv_fx.Budgets.uniform(LAYERS, capacity)
    llm = xkv_fx.transform(model, budgets, backend="eager")

    def without_cache() -> None:
        with torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)

    def dynamic_cache() -> None:
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)

    def budgeted() -> None:
        llm(ids, past_key_values=llm.new_session(), logits_to_keep=1)

    peaks = {run.__name__: peak_bytes(run) for run in (without_cache, dynamic_cache, budgeted)}
    layer = llm.layers[0].slot_bytes(torch.float32) * prompt
    above = peaks["budgeted"] - peaks["without_cache"]
    _report(
        prompt=prompt,
        capacity=capacity,
        peak_bytes=peaks,
        above_no_cache=above,
        kv_bytes=llm.kv_bytes,
        full_layer_bytes=layer,
        layers_above_budget=(above - llm.kv_bytes) / layer,
    )


@app.command()
def first_token(
    prompt: Prompt = 3500,
    capacity: Capacity = 1344,
    rounds: int = 7,
    scorers: Annotated[str, typer.Option(help="Names between commas, or all.")] = "snapkv",
) -> None:
    """Time to the first token against transformers' own prefill with `logits_to_keep=1`, in turns, by each scorer."""
    model, ids = smollm2_shape(2 * prompt + 64), random_prompt(prompt)  # some scorers read a prompt twice
    names = scorer_names() if scorers == "all" else scorers.split(",")
    plan = xkv_fx.Budgets.uniform(LAYERS, capacity)
    llm = xkv_fx.transform(model, plan, backend="eager", check=False)

    def transformers_prefill() -> None:
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)

    def budgeted(scorer: str) -> Callable[[], None]:
        ranked = llm.with_budgets(dataclasses.replace(plan, policy=xkv_fx.Policy(scorer=scorer)))
        session = ranked.new_session()

        def run() -> None:
            session.reset()
            ranked(ids, past_key_values=session, logits_to_keep=1)

        return run

    runs = {"transformers_prefill": transformers_prefill, **{name: budgeted(name) for name in names}}
    medians = medians_in_turns(runs, rounds)
    plain = medians["transformers_prefill"]
    ratios = {name: medians[name] / plain for name in names}
    _report(prompt=prompt, capacity=capacity, median_ms=medians, ratios=ratios)


_START = """
import time; start = time.perf_counter()
import sys, torch, xkv_fx
from xkv_fx.evaluation.speed.runtime_bench import LAYERS, smollm2_shape
model = smollm2_shape(8192, getattr(torch, sys.argv[2]))
llm = xkv_fx.transform(model, xkv_fx.Budgets.uniform(LAYERS, int(sys.argv[1])))
llm.generate(torch.ones(1, 20, dtype=torch.long), max_new_tokens=2)
print(time.perf_counter() - start)
"""


@app.command()
def starting(capacity: Capacity = 512, dtype: Dtype = "float32") -> None:
    """From the start of a process to the second token of a transformed model, where nothing is compiled yet, and once
    more by another process."""
    with tempfile.TemporaryDirectory() as compiled:
        first, second = (process_seconds(_START, capacity, dtype, compiled=compiled) for _ in range(2))
    ratios = {what: second[what] / first[what] for what in first}
    _report(capacity=capacity, dtype=dtype, first=first, second=second, ratios=ratios)


@app.command()
def profiling(prompt: Prompt = 1024, rounds: int = 5) -> None:
    """What a prompt takes `profile` once the model is captured, against a prefill with `logits_to_keep=1` before and
    after."""
    model, ids = smollm2_shape(prompt + 64), random_prompt(prompt)
    prefills: list[float] = []
    done: list[float] = []

    def prefill() -> None:
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)

    prefill()
    prefills += [seconds(prefill, model.device) for _ in range(rounds)]
    prompts = [ids.roll(place) for place in range(rounds + 1)]
    xkv_fx.profile(model, prompts, progress=lambda *_: done.append(time.perf_counter()))
    prefills += [seconds(prefill, model.device) for _ in range(rounds)]
    profiled = statistics.median(later - earlier for earlier, later in itertools.pairwise(done))
    plain = statistics.median(prefills)
    _report(prompt=prompt, profile_ms=profiled * 1e3, prefill_ms=plain * 1e3, ratio=profiled / plain)


@app.command()
def long_session(
    tokens: int = 20_000, prompt: Prompt = 2000, capacity: Capacity = 512, dtype: Dtype = "float32"
) -> None:
    """Decode far past the budget in one session and look at every thousand tokens."""
    model = smollm2_shape(32_768, getattr(torch, dtype))
    llm = xkv_fx.transform(model, xkv_fx.Budgets.uniform(LAYERS, capacity), backend="inductor", check=False)
    session = llm.new_session()
    logits = llm(random_prompt(prompt), past_key_values=session, logits_to_keep=1).logits
    buffers = [tensor.data_ptr() for tensor in session.session.state.tensors]
    compiled, spans = None, []
    for start in track(range(0, tokens, 1000), "thousands of tokens"):
        times: list[float] = []
        finite = True
        cpu = time.process_time()
        for _ in range(min(1000, tokens - start)):
            began = time.perf_counter()
            logits = llm(logits.argmax(-1), past_key_values=session, decoding=True).logits
            times.append(time.perf_counter() - began)
            finite = finite and bool(torch.isfinite(logits).all())
        compiled = _compilations() if compiled is None else compiled
        cpu_ms = (time.process_time() - cpu) / len(times) * 1e3
        median_ms = statistics.median(times) * 1e3
        spans.append(_Span(start + len(times), median_ms, cpu_ms, _peak_rss(), session.kv_bytes, finite))
        print(spans[-1], file=sys.stderr)
    _report(
        tokens=tokens,
        capacity=capacity,
        dtype=dtype,
        recompiled=_compilations() != compiled,
        buffers_moved=[tensor.data_ptr() for tensor in session.session.state.tensors] != buffers,
        last_to_first=spans[-1].median_ms / spans[0].median_ms,
        last_to_first_cpu=spans[-1].cpu_ms / spans[0].cpu_ms,
        spans=[dataclasses.asdict(span) for span in spans],
    )


@app.command()
def solving(layers: int = 80, context: Capacity = 131_072, rounds: int = 5) -> None:
    """Time to solve a plan of a quarter of all tokens, from sorted gains and from profiles of one prompt."""
    generator = np.random.default_rng(0)
    gains = -np.sort(-generator.exponential(size=(layers, context)).astype(np.float32), axis=1)
    gains /= gains.sum(1, keepdims=True)
    rough = generator.permuted(gains, axis=1)
    total = layers * context // 4
    profiles = {name: _profile(values) for name, values in (("concave", gains), ("not concave", rough))}
    runs: dict[str, Callable[[], object]] = {
        "fill_by_gain": lambda: fill_by_gain(gains, total),
        "fill_by_gain in blocks of 16": lambda: fill_by_gain(gains, total, multiple=16),
        **{
            f"solve, {name} curves": functools.partial(xkv_fx.solve, profile, total_tokens=total)
            for name, profile in profiles.items()
        },
    }
    _report(layers=layers, context=context, median_ms=medians_in_turns(runs, rounds))


def _profile(gains: NDArray[np.float32]) -> xkv_fx.Profile:
    sums = np.pad(np.cumsum(gains, axis=1, dtype=np.float64), ((0, 0), (1, 0)))
    curves: NDArray[np.float32] = np.minimum(sums / sums[:, -1:], 1.0).astype(np.float32)
    layer = xkv_fx.LayerSpec(query_heads=8, kv_heads=8, key_dim=128, value_dim=128, itemsize=2)
    return xkv_fx.Profile((curves,), xkv_fx.Policy(), (layer,) * len(gains), "random curves")


@app.command()
def decode_attention(
    rows: int = 8, capacity: Capacity = 1536, dtype: Dtype = "float32", rounds: int = 15, layers: int = LAYERS
) -> None:
    """Attention of one token a row over the kept K/V of all layers: milliseconds, and the share of the read's speed."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    q, k, v = (torch.randn(rows, heads, 1, 64).to(kind) for heads in (9, 3, 3))
    caches = [tuple(torch.randn(rows, 3, capacity, 64).to(kind) for _ in "kv") for _ in range(layers)]
    slot, mask = torch.full((rows,), 7), torch.zeros(rows, 1, 1, capacity, dtype=kind)
    decode_cpu.build(kind, 3, 64, 64)

    def kernel() -> None:
        for k_cache, v_cache in caches:
            torch.ops.xkv.decode_attention_cpu(q, k, v, k_cache, v_cache, slot, mask, 0.125)

    def torch_ops() -> None:
        for k_cache, v_cache in caches:
            torch.ops.xkv.decode_attention(q, k, v, k_cache, v_cache, slot, mask, 0.125)

    def read() -> None:
        for buffers in caches:
            for buffer in buffers:
                buffer.view(-1).view(torch.int64).sum()

    medians = medians_in_turns({"kernel": kernel, "torch_ops": torch_ops, "read": read}, rounds)
    _report(
        rows=rows,
        capacity=capacity,
        dtype=dtype,
        median_ms=medians,
        share_of_read_speed={name: medians["read"] / medians[name] for name in ("kernel", "torch_ops")},
    )


@dataclasses.dataclass(frozen=True)
class _Span:
    tokens: int
    median_ms: float
    cpu_ms: float  # a token, all threads: what a busy machine disturbs least
    peak_rss: int
    kv_bytes: int
    finite: bool


def _compilations() -> dict[str, dict[str, int]]:
    counters: Any = torch._dynamo.utils.counters
    return {part: dict(counter) for part, counter in counters.items()}


def _peak_rss() -> int:
    """The most memory that this process ever held, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _report(**figures: Any) -> None:
    json.dump({"threads": torch.get_num_threads(), "torch": torch.__version__, **figures}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    app()
