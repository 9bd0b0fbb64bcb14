"""`xkv-fx bench --many`: many requests of different lengths, by us and by what a user would otherwise run.

Everybody answers the same requests greedily, in as many bytes of K/V as ours takes: the rows of the batch, and the one
beside it in which the next prompt is fed. End tokens are not looked at, so that every answer has the length it was
asked for; tokens that a batch generates behind that are not counted.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import xkv_fx
from xkv_fx.errors import BackendError
from xkv_fx.evaluation.machine import describe_machine
from xkv_fx.hf.capture import layers_of_model
from xkv_fx.hf.generation import BudgetedLM
from xkv_fx.layers import LayerSpec
from xkv_fx.public_budgets import Budgets

CONTESTANTS = ("ours", "ours-padded", "padded", "continuous")
PAGE = 64
"""Tokens of a page of transformers' continuous batching; the last page of a request is half empty on average."""
NO_END = -1
"""An end token that no model has."""

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ManySettings:
    """What is answered, and by whom.

    Attributes:
        budgets: the plan of ours.
        requests: how many.
        prompt, answer: the fewest and the most tokens of each.
        rows: of our batch.
        only: which of `CONTESTANTS`; all when empty.
        backend: of ours.
        seed: of the requests.
    """

    budgets: Budgets
    requests: int = 64
    prompt: tuple[int, int] = (100, 3000)
    answer: tuple[int, int] = (16, 256)
    rows: int = 8
    only: tuple[str, ...] = ()
    backend: str = "inductor"
    seed: int = 0

    def check(self) -> None:
        """Raise BackendError for sizes or names that there are not."""
        for name, (least, most) in (("prompt", self.prompt), ("answer", self.answer)):
            if not 1 <= least <= most:
                raise BackendError(f"tokens of {name} must be from 1 on and in order; got {least} to {most}")
        unknown = sorted(set(self.only) - set(CONTESTANTS))
        if unknown:
            raise BackendError(f"unknown contestant {unknown[0]!r}; choose among {', '.join(CONTESTANTS)}")

    def asked(self, vocabulary: int) -> list[xkv_fx.Request]:
        """The requests: random tokens, lengths spread evenly over their ranges."""
        random = torch.Generator().manual_seed(self.seed)

        def drawn(least: int, most: int, count: int = 1) -> list[int]:
            found: list[int] = torch.randint(least, most + 1, (count,), generator=random).tolist()
            return found

        lengths, answers = (drawn(*span, self.requests) for span in (self.prompt, self.answer))
        return [
            xkv_fx.Request(drawn(0, vocabulary - 1, length), count)
            for length, count in zip(lengths, answers, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class ManyRun:
    """One contestant's figures. None is what was not measured.

    Attributes:
        rows: answered at the same time; None where pages are shared.
        kv_bytes: K/V that it may take.
        ready_s: capture and compilation.
        seconds: from the first request to the last answer.
        tokens_per_second: of the answers that were asked for.
        same: answers that are token for token those of `"ours"`; None where that took no part.
        skipped: why there are no figures.
    """

    name: str
    rows: int | None = None
    kv_bytes: int | None = None
    ready_s: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    same: int | None = None
    skipped: str | None = None


@dataclasses.dataclass(frozen=True)
class ManyBench:
    """All runs, and what they were measured on."""

    runs: tuple[ManyRun, ...]
    settings: dict[str, Any]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> Table:
        table = Table("", "rows", "KV MB", "ready s", "s", "tokens/s", "answers as ours")
        for run in self.runs:
            if run.skipped is not None:
                table.add_row(run.name, "", "", "", "", "", run.skipped)
                continue
            rows = "shared" if run.rows is None else str(run.rows)
            sizes = (f"{(run.kv_bytes or 0) / 1e6:.1f}", f"{run.ready_s:.1f}", f"{run.seconds:.1f}")
            same = "" if run.same is None else str(run.same)
            table.add_row(run.name, rows, *sizes, f"{run.tokens_per_second:.1f}", same)
        return table


def run_many_bench(
    model: PreTrainedModel, settings: ManySettings, say: Callable[[str], None] = lambda what: None
) -> ManyBench:
    """Let the contestants answer the same requests, one after the other.

    Raises:
        BackendError: sizes or names that there are not.
        BudgetError: a plan that does not fit the model.
    """
    settings.check()
    config: Any = model.config
    asked = settings.asked(config.get_text_config(decoder=True).vocab_size)
    wanted = sum(request.max_new_tokens or 0 for request in asked)
    layers = layers_of_model(model)
    limit = settings.budgets.kv_bytes(layers, settings.rows + 1, max_new_tokens=settings.answer[1])
    runs: list[ManyRun] = []
    of_ours: list[Ids] | None = None
    for name in CONTESTANTS:
        if settings.only and name not in settings.only:
            continue
        say(f"{name} ...")
        start = time.perf_counter()
        try:
            contestant = _contestant(name, model, layers, settings, limit)
        except BackendError as error:
            runs.append(ManyRun(name, skipped=str(error)))
            continue
        ready = time.perf_counter() - start
        answers = contestant.answers(asked)
        seconds = time.perf_counter() - start - ready
        if name == "ours":
            of_ours = answers
        same = None if of_ours is None else sum(map(operator.eq, answers, of_ours))
        runs.append(ManyRun(name, contestant.rows, contestant.kv_bytes, ready, seconds, wanted / seconds, same))
        say(f"{name}: {seconds:.1f} s, {wanted / seconds:.1f} tokens/s")
    described = {
        "requests": settings.requests, "prompt": settings.prompt, "answer": settings.answer, "rows": settings.rows,
        "capacities": settings.budgets.capacities, "answer_tokens": wanted,
        "prompt_tokens": sum(len(request.prompt) for request in asked), "dtype": str(model.dtype),
    }  # fmt: skip
    return ManyBench(tuple(runs), described, describe_machine(model.device))


@dataclasses.dataclass(frozen=True)
class _Contestant:
    """One way of answering.

    Attributes:
        rows, kv_bytes: as in `ManyRun`.
        answers: answers requests, each cut to what it asked for.
    """

    rows: int | None
    kv_bytes: int
    answers: Callable[[Sequence[xkv_fx.Request]], list[Ids]]


def _contestant(
    name: str, model: PreTrainedModel, layers: Sequence[LayerSpec], settings: ManySettings, limit: int
) -> _Contestant:
    """Ready to answer: captured and compiled.

    Raises:
        BackendError: it cannot take part; the message says why.
    """
    token = sum(layer.slot_bytes() for layer in layers)
    longest = settings.prompt[1] + settings.answer[1]
    if name in ("ours", "ours-padded"):
        llm = xkv_fx.transform(
            model, settings.budgets, settings.rows, settings.backend, max_new_tokens=settings.answer[1]
        )
        if name == "ours":
            list(llm.generate_many([[1, 2]], 2))  # captures the row beside the batch
            return _Contestant(settings.rows, limit, lambda asked: _by_us(llm, asked))
        return _Contestant(settings.rows, llm.kv_bytes, lambda asked: _padded(llm, asked, settings.rows))
    if name == "padded":
        rows = limit // (longest * token)
        if not rows:
            raise BackendError(f"{limit:,} bytes do not hold one request of {longest:,} tokens")
        return _Contestant(rows, rows * longest * token, lambda asked: _padded(model, asked, rows))
    pages = limit // (PAGE * token)
    if pages * PAGE < longest:
        raise BackendError(f"{limit:,} bytes do not hold one request of {longest:,} tokens")
    _check_pages()
    return _Contestant(None, pages * PAGE * token, lambda asked: _continuous(model, asked, pages))


def _check_pages() -> None:
    """Raise BackendError unless the size of pages can be chosen: without it, equal bytes are not to be had."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    if "page_size" not in inspect.signature(ContinuousBatchingConfig).parameters:
        raise BackendError(
            f"transformers {transformers.__version__} does not let its continuous batching have pages of a given size"
        )


def _by_us(llm: BudgetedLM, asked: Sequence[xkv_fx.Request]) -> list[Ids]:
    return [answer.ids for answer in llm.generate_many(asked, end_tokens=())]


def _padded(model: Any, asked: Sequence[xkv_fx.Request], rows: int) -> list[Ids]:
    """Batches in the order of the requests, padded on the left, each as long as its longest answer."""
    answers: list[Ids] = []
    for start in range(0, len(asked), rows):
        batch = list(asked[start : start + rows])
        counts = [request.max_new_tokens or 0 for request in batch]
        batch += [batch[-1]] * (rows - len(batch))  # our batches are always whole
        width = max(len(request.prompt) for request in batch)
        ids, mask = torch.zeros(rows, width, dtype=torch.int64), torch.zeros(rows, width, dtype=torch.int64)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        output: Tensor = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max(counts),
            do_sample=False, eos_token_id=NO_END, pad_token_id=0,
        )  # fmt: skip
        answers += [tuple(row[:count].tolist()) for row, count in zip(output[:, width:], counts, strict=False)]
    return answers


def _continuous(model: Any, asked: Sequence[xkv_fx.Request], pages: int) -> list[Ids]:
    """transformers' continuous batching, with a limit for each request, which `generate_batch` does not take."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=256)
    generation = GenerationConfig(do_sample=False, eos_token_id=NO_END, pad_token_id=0)
    found: dict[str, Ids] = {}
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config
    ) as manager:
        for index, request in enumerate(asked):
            manager.add_request(list(request.prompt), str(index), max_new_tokens=request.max_new_tokens)
        for result in _results(manager, len(asked)):
            found[result.request_id] = tuple(result.generated_tokens)
    return [found[str(index)] for index in range(len(asked))]


def _results(manager: Any, count: int) -> Iterator[Any]:
    """Finished requests, until there are so many.

    Raises:
        BackendError: one failed, or the thread that answers them ended.
    """
    while count:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise BackendError("transformers' continuous batching ended before all requests were answered")
            continue
        if result.error is not None:
            raise BackendError(f"transformers' continuous batching failed: {result.error}")
        if result.is_finished():
            count -= 1
            yield result
