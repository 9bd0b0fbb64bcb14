"""Tasks over plans: what is asked, of which plans, in which form; one prefill of a prompt serves all plans of a scorer.

What is measured may be kept in a folder, so that an interrupted run goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import xkv_fx
from xkv_fx.errors import BudgetError, PromptError
from xkv_fx.evaluation.quality.answering import (
    BudgetedReader,
    Reader,
    TransformersReader,
    answer,
    end_tokens,
    forced,
)
from xkv_fx.evaluation.quality.candidates import Candidate, Entry, check_equal_bytes
from xkv_fx.evaluation.quality.kvpress import Job, Kvpress, answers_of
from xkv_fx.evaluation.quality.metrics import compare
from xkv_fx.evaluation.quality.parts import Parts
from xkv_fx.evaluation.quality.quantized import quantized_reader
from xkv_fx.evaluation.quality.results import CONTINUATION_TASK, FULL, Evaluation, Row
from xkv_fx.evaluation.quality.shared_prefill import Recorded, Recorder, can_record
from xkv_fx.evaluation.tasks import Instance, make_instances
from xkv_fx.evaluation.texts import cut_prompts, source_code
from xkv_fx.hf.capture import layers_of_model
from xkv_fx.layers import with_itemsize
from xkv_fx.planning.measure.team import Progress
from xkv_fx.planning.solve.constraints import full_bytes
from xkv_fx.policy import Policy
from xkv_fx.public_budgets import Budgets

INSIDE, AFTER = "inside", "after"
QUESTION_FORMS = (INSIDE, AFTER)
# Tokens of text after a prompt that are compared.
FORCED = 32


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What decides the examples.

    Attributes:
        tasks: names; `"continuation"` compares next-token distributions over a text instead of asking.
        forms: `"inside"`, the question is a part of the prompt; `"after"`, it is asked in a second turn, when the
            context was compressed without it.
        length: tokens of context and question together.
        count: examples of each task.
        seed: of everything that is drawn.
    """

    tasks: tuple[str, ...]
    forms: tuple[str, ...] = QUESTION_FORMS
    length: int = 1024
    count: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise PromptError("name at least one task")
        unknown = [form for form in self.forms if form not in QUESTION_FORMS]
        if unknown or not self.forms:
            raise PromptError(f"forms must be some of {', '.join(QUESTION_FORMS)}; got {', '.join(unknown) or 'none'}")

    def instances(self, task: str, tokenizer: Any) -> tuple[Instance, ...]:
        """The examples of a task; of `"continuation"` the question is the text that follows.

        Raises:
            PromptError: see `make_instances`.
        """
        if task != CONTINUATION_TASK:
            return make_instances(task, tokenizer, self.length, self.count, self.seed)
        stretches = cut_prompts(tokenizer, source_code(), self.count, self.length + FORCED)
        return tuple(Instance(ids[:, : self.length], ids[:, self.length :], (), new_tokens=FORCED) for ids in stretches)

    def forms_of(self, task: str) -> tuple[str, ...]:
        return (INSIDE,) if task == CONTINUATION_TASK else self.forms


def evaluate(
    model: Any,
    tokenizer: Any,
    candidates: Sequence[Candidate],
    settings: EvaluationSettings,
    quantized: Sequence[str] = (),
    backend: str = "eager",
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    llm: Any = None,
    dtype: torch.dtype | None = None,
    kvpress: Kvpress | None = None,
) -> Evaluation:
    """Ask everything of the full cache, of every plan, of transformers' quantized caches, and of kvpress.

    Args:
        model: a transformers causal language model.
        tokenizer: the model's.
        candidates: plans; those of one size must take equal bytes.
        quantized: names of quantized caches, installed ones.
        backend: as in `xkv_fx.transform`; `"eager"` compiles nothing.
        resume: a folder for what was measured so far, a file for each plan, task and form.
        progress: called as `progress(done, total)`, counting examples times plans.
        llm: the model, transformed for one row already; it is captured here when None.
        dtype: that bytes are counted in, whatever the model computes in; the model's own by default.
        kvpress: where it is installed, if it is to be asked, too.

    Raises:
        PromptError: an unknown task or form, or a length that is too short for a task or too long for the model.
        BudgetError: plans of one size that take different bytes, two of one name, or one that the model cannot have.
        ModelMismatchError: a plan, or a `resume` folder, of another model.
        FileFormatError: a `resume` folder of a run with other settings.
        BackendError: an unknown quantized cache, or one that is not installed; or kvpress did not answer.
    """
    examples = {task: settings.instances(task, tokenizer) for task in settings.tasks}
    room = max(instance.new_tokens for made in examples.values() for instance in made)
    longest = max(instance.prompt.shape[1] for made in examples.values() for instance in made) + room
    if llm is None:
        llm = xkv_fx.transform(model, Budgets.full(len(layers_of_model(model)), longest), backend=backend)
    limit = llm.program.max_positions
    if limit is not None and longest > limit:
        raise PromptError(f"prompts and answers of {longest} tokens are more than the model's {limit} positions")
    everyone = (Candidate(FULL, FULL, Budgets.full(len(llm.layers), longest)), *candidates)
    _check_names(everyone)
    counted = with_itemsize(llm.layers, (dtype or llm.dtype).itemsize)
    check_equal_bytes(candidates, counted, settings.length)
    for candidate in candidates:
        candidate.budgets.check_layers(llm.layers, llm.program.graphs.captured.fingerprint)

    asked = _Asked(model, tokenizer, llm, room, longest, dtype or llm.dtype)
    captured = llm.program.graphs.captured
    parts = None if resume is None else Parts(resume, captured, settings.length, settings.seed, room, dtype)
    entries = [Entry(candidate.name, candidate.size, candidate.budgets) for candidate in everyone]
    entries += [Entry(name, name, None) for name in quantized]
    for entry in entries:
        if entry.budgets is None:
            quantized_reader(entry.name, model, asked.dtype)  # says what is not installed before anything is run

    jobs = [(task, form) for task in settings.tasks for form in settings.forms_of(task)]
    peer = [job for task, form in jobs for job in (kvpress.jobs(task, form, examples[task]) if kvpress else ())]
    steps = sum(len(entries) * len(examples[task]) for task, _ in jobs) + sum(len(job.made) for job in peer)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    rows = []
    for task, form in jobs:
        made = examples[task]
        found = {entry: None if parts is None else parts.read(entry, task, form, made) for entry in entries}
        missing = [entry for entry, row in found.items() if row is None]
        for _ in range((len(entries) - len(missing)) * len(made)):
            count()
        measured = _measure(asked, task, form, made, missing, count) if missing else {}
        for entry, row in measured.items():
            if parts is not None:
                parts.write(entry, task, form, made, row)
            found[entry] = row
        rows += [row for row in found.values() if row is not None]
    if kvpress is not None:
        rows += _ask_kvpress(kvpress, peer, asked, parts, full_bytes(counted, settings.length), count)
    return Evaluation(
        model=captured.fingerprint,
        dtype=str(dtype or llm.dtype).removeprefix("torch."),
        settings=dataclasses.asdict(settings),
        plans=everyone,
        rows=tuple(rows),
        full_bytes=full_bytes(counted, settings.length),
    )


class _Asked:
    """The model under every plan that was needed so far."""

    def __init__(self, model: Any, tokenizer: Any, llm: Any, room: int, longest: int, dtype: torch.dtype) -> None:
        self.model, self.tokenizer, self.llm = model, tokenizer, llm
        self.room, self.longest, self.dtype = room, longest, dtype
        self.ends = end_tokens(llm)
        self.reader = functools.cache(self._reader)
        self.recorder = functools.cache(self._recorder)
        self.can_record = functools.cache(functools.partial(can_record, llm, tokens=longest))

    def _reader(self, entry: Entry) -> BudgetedReader | TransformersReader:
        if entry.budgets is None:
            return quantized_reader(entry.name, self.model, self.dtype)
        if entry.budgets == self.llm.budgets:  # the full cache, built already
            return BudgetedReader(self.llm)
        # All plans get the same room, on top of what they were solved for.
        return BudgetedReader(self.llm.with_budgets(entry.budgets, max_new_tokens=self.room, over_limit=True))

    def kv_bytes(self, entry: Entry, reader: Reader) -> int:
        """Bytes that an entry takes, in the dtype that they are counted in.

        Raises:
            BudgetError: a session does not allocate what its plan says.
        """
        if entry.budgets is None:
            return reader.kv_bytes
        planned = functools.partial(entry.budgets.kv_bytes, self.llm, max_new_tokens=self.room)
        if reader.kv_bytes != planned(dtype=self.llm.dtype):
            raise BudgetError(f"the plan {entry.name!r} of the size {entry.size!r} does not allocate the bytes it says")
        return int(planned(dtype=self.dtype))

    def _recorder(self, policy: Policy) -> Recorder:
        return Recorder(self.llm, policy, self.longest)

    def scorer_of(self, entry: Entry) -> Policy | None:
        """What prompts may be recorded by for this entry; None if it must read them itself."""
        if entry.budgets is None or entry.budgets.formats is not None:  # recorded are tokens in the model's dtype
            return None
        policy = entry.budgets.policy
        ranked = Policy(policy.scorer, policy.scorer_options)
        return ranked if self.can_record(ranked) else None


def _ask_kvpress(
    kvpress: Kvpress,
    jobs: Sequence[Job],
    asked: _Asked,
    parts: Parts | None,
    of_full: int,
    count: Callable[[], None],
) -> list[Row]:
    """What kvpress answers; what was kept of an earlier run is taken."""
    found: dict[Job, Row | None] = {
        job: None if parts is None else parts.read(job.entry, job.task, job.form, job.made) for job in jobs
    }
    missing = [job for job, row in found.items() if row is None]
    for _ in range(sum(len(job.made) for job, row in found.items() if row is not None)):
        count()
    dtype = str(asked.llm.dtype).removeprefix("torch.")
    for job, row in answers_of(kvpress, missing, dtype, sorted(asked.ends), asked.tokenizer.decode, of_full):
        found[job] = row
        if parts is not None:
            parts.write(job.entry, job.task, job.form, job.made, row)
        for _ in job.made:
            count()
    return [row for row in found.values() if row is not None]


def _measure(
    asked: _Asked, task: str, form: str, made: Sequence[Instance], entries: Sequence[Entry], count: Callable[[], None]
) -> dict[Entry, Row]:
    """Every example put to each of the entries."""
    measured: dict[Entry, _Measured] = {entry: _Measured() for entry in entries}
    full = Entry(FULL, FULL, Budgets.full(len(asked.llm.layers), asked.longest))
    for instance in made:
        shown = instance.context if form == AFTER or task == CONTINUATION_TASK else instance.prompt
        recorded: dict[Policy, Recorded] = {}
        reference: Tensor | None = None
        if task == CONTINUATION_TASK:
            reader = asked.reader(full)
            reference = forced(reader, _shown(asked, full, reader, shown, recorded), instance.question)
        for entry in entries:
            reader = asked.reader(entry)
            logits = _shown(asked, entry, reader, shown, recorded)
            if reference is not None:
                own = forced(reader, logits, instance.question)
                values = compare(reference, own, instance.question[0].to(own.device))
                measured[entry].add(values, "", asked.kv_bytes(entry, reader))
            else:
                if form == AFTER:
                    logits = reader.read(instance.question.to(asked.llm.device))
                tokens = answer(reader, logits, instance.new_tokens, asked.ends)
                text = str(asked.tokenizer.decode(tokens))
                measured[entry].add({"score": instance.score(text)}, text, asked.kv_bytes(entry, reader))
            count()
    return {entry: found.row(entry, task, form) for entry, found in measured.items()}


def _shown(
    asked: _Asked,
    entry: Entry,
    reader: BudgetedReader | TransformersReader,
    shown: Tensor,
    recorded: dict[Policy, Recorded],
) -> Tensor:
    """Let a reader start again with a prompt, which is read once for all entries of one scorer."""
    reader.start_again()
    policy = asked.scorer_of(entry)
    if policy is None or not isinstance(reader, BudgetedReader):
        return reader.read(shown.to(asked.llm.device))
    if policy not in recorded:
        recorded[policy] = asked.recorder(policy).read(shown.to(asked.llm.device))
    return recorded[policy].into(reader)


class _Measured:
    """What one entry answered so far."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.texts: list[str] = []
        self.kv_bytes = 0

    def add(self, values: Mapping[str, float], text: str, kv_bytes: int) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)
        self.texts.append(text)
        self.kv_bytes = max(self.kv_bytes, kv_bytes)

    def row(self, entry: Entry, task: str, form: str) -> Row:
        policy = None if entry.budgets is None else entry.budgets.policy
        values = {name: tuple(each) for name, each in self.values.items()}
        return Row(entry.name, entry.size, policy, task, form, self.kv_bytes, values, tuple(self.texts))


def _check_names(candidates: Sequence[Candidate]) -> None:
    seen = set()
    for candidate in candidates:
        key = (candidate.name, candidate.size, candidate.policy)
        if key in seen:
            raise BudgetError(f"there are two plans named {candidate.name!r} of the size {candidate.size!r}")
        seen.add(key)
