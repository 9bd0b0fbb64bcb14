"""`xkv-fx bench`: our decode beside what a user would otherwise run, in one process and in turns."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

import xkv_fx
from xkv_fx.errors import BackendError, BudgetError
from xkv_fx.evaluation.machine import BYTES_READ, MemoryReader, available_bytes, describe_machine, seconds
from xkv_fx.evaluation.quality.quantized import QUANTIZED
from xkv_fx.evaluation.speed.bench_result import Bench, Run
from xkv_fx.evaluation.speed.contestants import Contestant, Ours, dynamic, quantized, sliding, static
from xkv_fx.evaluation.speed.live_bytes import peak_bytes
from xkv_fx.evaluation.speed.peers import PEERS, PeerRequest, run_peer
from xkv_fx.evaluation.speed.weights import weight_bytes, with_int8_weights
from xkv_fx.formats import LayerFormats, pair_name
from xkv_fx.hf.capture import layers_of_model
from xkv_fx.hf.generation import BudgetedLM
from xkv_fx.public_budgets import Budgets

OURS = ("ours-full", "ours", "ours-int8", "ours-plain", "ours-equal-bytes")
PLAIN = ("ours-plain", "static-plain")
"""Caches without budgets, filled to their last slot: ours of our plan's capacities, transformers' of the largest."""
HERE = ("dynamic", "static", "static-plain", "sliding", *QUANTIZED, *OURS)
EQUAL_BYTES = "-equal-bytes"
"""Ends the name of a contestant that takes as many rows as fit into the bytes of our full cache."""
WARM_STEPS = 3
TOKENS_WORTH_A_PREFILL = 8192
"""More tokens than this in all rows would take minutes on a CPU; caches are then filled directly, unless asked."""


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        context: tokens that every row has seen.
        rows: of the batch.
        budgets: the plan of `ours`.
        rounds, new_tokens: every contestant decodes `new_tokens` tokens in each of `rounds` rounds.
        only: which of `known`; all when empty.
        backend: of ours.
        prefill: feed a real prompt, or fill the caches directly; by the number of tokens when None.
        pythons: the interpreters that other engines live in, by name.
        folder, gguf: where the model is, for those.
        formats: of keys and values; for each of them, two more contestants keep all tokens so: as many rows as the
            others, and as many as fit into the bytes of our full cache.
    """

    context: int
    rows: int
    budgets: Budgets
    rounds: int = 5
    new_tokens: int = 8
    only: tuple[str, ...] = ()
    backend: str = "inductor"
    prefill: bool | None = None
    pythons: Mapping[str, str] = dataclasses.field(default_factory=dict)
    folder: str = ""
    gguf: str | None = None
    formats: tuple[LayerFormats, ...] = ()

    @property
    def of_formats(self) -> dict[str, LayerFormats]:
        """The contestants that keep all tokens in fewer bits, by name."""
        alike = {f"ours-all-{pair_name(pair)}": pair for pair in self.formats}
        return alike | {f"{name}{EQUAL_BYTES}": pair for name, pair in alike.items()}

    @property
    def known(self) -> tuple[str, ...]:
        """The names of all contestants."""
        return (*HERE, *self.of_formats, *PEERS)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self.known if not self.only or name in self.only)

    @property
    def steps(self) -> int:
        """Tokens that each contestant decodes in all."""
        return self.rounds * self.new_tokens + WARM_STEPS + 1

    @property
    def feeds_prompts(self) -> bool:
        return self.context * self.rows <= TOKENS_WORTH_A_PREFILL if self.prefill is None else self.prefill

    def asked_of_peers(self, dtype: torch.dtype) -> PeerRequest:
        """What other engines are asked to measure: as many kept tokens, spread evenly over the layers."""
        return PeerRequest(
            folder=self.folder,
            gguf=self.gguf,
            context=self.context,
            rows=self.rows,
            kept=round(self.budgets.total_tokens / len(self.budgets.capacities)),
            new_tokens=self.rounds * self.new_tokens,
            dtype=str(dtype).removeprefix("torch."),
        )

    def check(self, model: PreTrainedModel) -> None:
        """
        Raises:
            BudgetError: sizes out of range, a plan that does not fit, a batch that does not fit into memory.
            BackendError: unknown names.
        """
        unknown = sorted(set(self.only) - set(self.known))
        if unknown:
            raise BackendError(f"unknown contestants: {', '.join(unknown)}; choose from {', '.join(self.known)}")
        for name in ("context", "rows", "rounds", "new_tokens"):
            if getattr(self, name) < 1:
                raise BudgetError(f"{name} must be at least 1; got {getattr(self, name)}")
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and self.context + self.steps > positions:
            raise BudgetError(
                f"a context of {self.context} and {self.steps} decoded tokens are more than the model's {positions} "
                "positions; shorten --context, or lower --rounds or --new-tokens"
            )
        if self.budgets.policy.eviction not in ("ring", "scored"):
            raise BudgetError(
                f"the bench decodes past the budgets, which eviction={self.budgets.policy.eviction!r} refuses"
            )
        smallest = min(self.budgets.every_capacity)
        plain = [name for name in PLAIN if name in self.names]
        if plain and smallest <= self.steps:
            raise BudgetError(
                f"{self.steps} decoded tokens do not fit into the {smallest} slots of the smallest layer, which "
                f"{' and '.join(plain)} fill without evicting; lower --rounds or --new-tokens, or leave them out by "
                "--only"
            )
        needed, free = self._bytes(model), available_bytes(model.device)
        if free is not None and needed > free:
            raise BudgetError(
                f"{self.rows} rows of {self.context} tokens do not fit: what {', '.join(self.names)} hold takes "
                f"{needed:,} bytes together, and {free:,} are free; lower --batch or --context, or name fewer by --only"
            )

    def _bytes(self, model: PreTrainedModel) -> int:
        full = _full(self, model).kv_bytes(model, batch_size=self.rows)
        kept = self.budgets.kv_bytes(model, batch_size=self.rows)
        each = {"dynamic": 2 * full, "static": full, "sliding": 2 * kept, "ours-full": full, "ours": kept}
        each |= {"ours-int8": kept + weight_bytes(model)}  # quantizing starts from a copy
        most = Budgets.full(len(self.budgets.capacities), max(self.budgets.every_capacity))
        each |= {"static-plain": most.kv_bytes(model, batch_size=self.rows)}
        each |= {"ours-plain": kept, "ours-equal-bytes": full, **dict.fromkeys(QUANTIZED, 2 * full)}
        each |= {
            name: full if name.endswith(EQUAL_BYTES) else _full(self, model, pair).kv_bytes(model, batch_size=self.rows)
            for name, pair in self.of_formats.items()
        }
        return sum(each.get(name, 0) for name in self.names)


def run_bench(
    model: PreTrainedModel, settings: BenchSettings, progress: Callable[[str], None] = lambda _: None
) -> Bench:
    """Measure everybody in turns.

    Args:
        progress: called with what is being done.

    Raises:
        BudgetError, BackendError: see `BenchSettings.check`; and as `xkv_fx.transform`.
    """
    settings.check(model)
    here, skipped = [], []
    for name, make in _makers(model, settings).items():
        missing = _missing(name)
        if name in settings.names and missing:
            reason = f"not installed; pip install {missing}"
            skipped.append(Run(name, settings.rows, settings.context, skipped=reason))
        elif name in settings.names:
            progress(f"{name}: made ready")
            here.append(_prepared(model, name, make, settings))
    reader = MemoryReader(model.device)
    reads: list[float] = []
    for turn in range(settings.rounds):
        progress(f"decode, round {turn + 1} of {settings.rounds}")
        reads += [reader.seconds() for _ in range(3)]
        for entry in here:
            entry.times += [seconds(entry.contestant.step, model.device) for _ in range(settings.new_tokens)]
    bandwidth = BYTES_READ / statistics.median(reads)
    runs = [*(entry.run(settings, bandwidth) for entry in here), *skipped]
    for name in settings.names:
        if name in PEERS:
            progress(name)
            runs.append(run_peer(name, settings.pythons.get(name), settings.asked_of_peers(model.dtype)))
    machine = {
        **describe_machine(model.device),
        "read_bytes_per_second": bandwidth,
        "weight_bytes": weight_bytes(model),
    }
    return Bench(tuple(runs), machine)


def _missing(name: str) -> str | None:
    """The package to install for a contestant, if it is not there."""
    if name in QUANTIZED and not QUANTIZED[name].installed:
        return QUANTIZED[name].package
    return "torchao" if name == "ours-int8" and importlib.util.find_spec("torchao") is None else None


@dataclasses.dataclass
class _Entry:
    """A contestant and what was measured of it so far."""

    contestant: Contestant
    prefill_s: float | None
    ready_s: float
    peak_bytes: int | None
    times: list[float] = dataclasses.field(default_factory=list)

    def run(self, settings: BenchSettings, bandwidth: float) -> Run:
        contestant = self.contestant
        weights = weight_bytes(contestant.model)
        return Run.of_steps(
            contestant.name,
            contestant.rows,
            settings.context,
            self.times,
            filled=self.prefill_s is None,
            prefill_s=self.prefill_s,
            ready_s=self.ready_s,
            kv_bytes=contestant.kv_bytes,
            peak_bytes=None if self.peak_bytes is None else self.peak_bytes + weights + contestant.kv_bytes,
            floor_ms=(weights + contestant.kv_bytes) / bandwidth * 1e3,
        )


def _prepared(model: PreTrainedModel, name: str, make: Callable[[], Contestant], settings: BenchSettings) -> _Entry:
    started = time.perf_counter()
    contestant = make()
    prefill = None
    # what is compared at a length of its own (a plain cache that is just full, more rows) is always filled
    if settings.feeds_prompts and name not in PLAIN and not name.endswith(EQUAL_BYTES):
        ids = _prompt(model, contestant.rows, settings.context)
        contestant.prefill(ids)
        prefill = seconds(functools.partial(contestant.prefill, ids), model.device)
    else:
        contestant.fill(_seen(name, settings))
    contestant.step()
    ready = time.perf_counter() - started
    for _ in range(WARM_STEPS - 1):
        contestant.step()
    peak = peak_bytes(contestant.step) if model.device.type == "cpu" else None
    return _Entry(contestant, prefill, ready, peak)


def _makers(model: PreTrainedModel, settings: BenchSettings) -> dict[str, Callable[[], Contestant]]:
    rows = settings.rows
    longest = max(settings.budgets.every_capacity)
    full = _full(settings, model)
    plain = dataclasses.replace(Budgets.full(len(full.capacities), 1), capacities=settings.budgets.capacities)

    @functools.cache
    def transformed(batch: int) -> BudgetedLM:
        return xkv_fx.transform(
            model, settings.budgets, batch_size=batch, backend=settings.backend, over_limit=batch > rows
        )

    def ours(name: str, budgets: Budgets) -> Contestant:
        if budgets == settings.budgets:
            return Ours(name, model, transformed(rows))
        return Ours(name, model, transformed(rows).with_budgets(budgets))

    def int8() -> Contestant:
        int8_model = with_int8_weights(model)
        return Ours(
            "ours-int8",
            int8_model,
            xkv_fx.transform(int8_model, settings.budgets, batch_size=rows, backend=settings.backend),
        )

    def equal_bytes() -> Contestant:
        return Ours("ours-equal-bytes", model, transformed(rows_within(settings.budgets)))

    def rows_within(budgets: Budgets) -> int:
        return max(1, full.kv_bytes(model, batch_size=rows) // budgets.kv_bytes(model))

    def in_formats(name: str, pair: LayerFormats) -> Contestant:
        budgets = _full(settings, model, pair)
        if not name.endswith(EQUAL_BYTES):
            return Ours(name, model, transformed(rows).with_budgets(budgets))
        more = rows_within(budgets)
        return Ours(name, model, xkv_fx.transform(model, budgets, batch_size=more, backend=settings.backend))

    return {
        "dynamic": lambda: dynamic(model, rows),
        "static": lambda: static(model, rows, settings.context + settings.steps),
        "static-plain": lambda: static(model, rows, longest, "static-plain"),
        "sliding": lambda: sliding(model, rows, longest),
        **{name: functools.partial(quantized, name, model, rows) for name in QUANTIZED},
        "ours-full": lambda: ours("ours-full", full),
        "ours": lambda: ours("ours", settings.budgets),
        "ours-int8": int8,
        "ours-plain": lambda: ours("ours-plain", plain),
        "ours-equal-bytes": equal_bytes,
        **{name: functools.partial(in_formats, name, pair) for name, pair in settings.of_formats.items()},
    }


def _full(settings: BenchSettings, model: PreTrainedModel, pair: LayerFormats | None = None) -> Budgets:
    full = Budgets.full(len(layers_of_model(model)), settings.context + settings.steps)
    return dataclasses.replace(full, formats=(pair,) * len(full.capacities))


def _seen(name: str, settings: BenchSettings) -> int:
    if name in PLAIN:
        return min(settings.budgets.every_capacity) - settings.steps
    return settings.context


def _prompt(model: PreTrainedModel, rows: int, tokens: int) -> Tensor:
    vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[assignment, index]
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)
