"""What kvpress answers at equal bytes: measured by a script in the environment that kvpress lives in.

A press keeps a share of a prompt's tokens, in the model's dtype. Some presses choose capacities for each prompt and
head while it runs and mask what they drop, so that they hold more memory than they are counted with here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xkv_fx.errors import BackendError, FileFormatError
from xkv_fx.evaluation.quality.candidates import Entry, label_of
from xkv_fx.evaluation.quality.results import CONTINUATION_TASK, Row
from xkv_fx.evaluation.tasks import Instance
from xkv_fx.fields import LIST, NUMBER, check_fields, list_of, whole
from xkv_fx.files import parse_json

PRESSES = ("snapkv", "kvzip", "adakv")
"""SnapKV (arXiv 2404.14469), KVzip (2505.23416), and AdaKV (2407.11550) around Expected Attention."""
_LINE = {"job": whole(0), "answers": LIST}
_METRICS = dict.fromkeys(("kl", "nll_change", "agreement"), NUMBER)
_TOKENS = {"tokens": list_of(whole(0))}


@dataclasses.dataclass(frozen=True)
class Kvpress:
    """Where it is, and what is asked of it.

    Attributes:
        python: the interpreter of the environment that it is installed in.
        folder, gguf: where the model is; the name of a GGUF file in the folder, if it is one.
        shares: of a prompt's tokens, that are kept.
        presses: which of `PRESSES`.
    """

    python: Path
    folder: str
    gguf: str | None
    shares: tuple[float, ...]
    presses: tuple[str, ...] = PRESSES

    def __post_init__(self) -> None:
        unknown = [press for press in self.presses if press not in PRESSES]
        if unknown:
            raise BackendError(f"unknown presses {', '.join(unknown)}; choose from {', '.join(PRESSES)}")

    def jobs(self, task: str, form: str, made: tuple[Instance, ...]) -> list[Job]:
        """Everything that is asked of it on these examples; a share of all tokens is the full cache."""
        return [
            Job(press, label_of(share), share, task, form, made)
            for press in self.presses
            for share in self.shares
            if share < 1
        ]


@dataclasses.dataclass(frozen=True, eq=False)  # its examples hold tensors
class Job:
    """One press at one share on one task in one form.

    Attributes:
        press: its name.
        size, share: what the share of the prompt's tokens is called, and what it is.
        task, form: what is asked, and how.
        made: the examples.
    """

    press: str
    size: str
    share: float
    task: str
    form: str
    made: tuple[Instance, ...]

    @property
    def entry(self) -> Entry:
        return Entry(f"kvpress {self.press}", self.size, None)

    def to_dict(self) -> dict[str, Any]:
        examples = [
            {
                "context": instance.context[0].tolist(),
                "question": instance.question[0].tolist(),
                "new_tokens": instance.new_tokens,
            }
            for instance in self.made
        ]
        form = None if self.task == CONTINUATION_TASK else self.form
        return {"press": self.press, "share": self.share, "form": form, "examples": examples}


def answers_of(
    kvpress: Kvpress,
    jobs: Sequence[Job],
    dtype: str,
    ends: Sequence[int],
    decode: Callable[[list[int]], str],
    full_bytes: int,
) -> Iterator[tuple[Job, Row]]:
    """The rows of these jobs, one after another as they are measured.

    Args:
        dtype: torch's name of what the model computes in.
        ends: tokens that end an answer.
        decode: tokens as text.
        full_bytes: of a full cache of the prompt, which shares are of.

    Raises:
        BackendError: it could not be run, or what it printed could not be read.
    """
    if not jobs:
        return
    script = importlib.resources.files("xkv_fx.evaluation.quality").joinpath("peer_scripts", "kvpress_answers.py")
    request = {
        "folder": kvpress.folder, "gguf": kvpress.gguf, "dtype": dtype, "ends": list(ends),
        "jobs": [job.to_dict() for job in jobs],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "request.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [str(kvpress.python), "-c", script.read_text(encoding="utf-8"), str(asked)]
        with open(Path(folder) / "errors", "w+", encoding="utf-8") as errors, _started(command, errors) as process:
            for index, job in enumerate(jobs):
                line = _next_line(process)
                if line is None:
                    process.wait()
                    errors.seek(0)
                    last = next(iter(reversed(errors.read().strip().splitlines())), "no word")
                    raise BackendError(f"kvpress did not answer {job.press} at {job.size} on {job.task}: {last}")
                yield job, _row(index, job, line, decode, round(job.share * full_bytes))


@contextlib.contextmanager
def _started(command: Sequence[str], errors: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8")
    except OSError as error:
        raise BackendError(f"kvpress cannot be run by {command[0]}: {error}") from error
    with process:
        try:
            yield process
        finally:
            process.kill()


def _next_line(process: subprocess.Popen[str]) -> str | None:
    """The next line of JSON; libraries print others, too."""
    return next((line for line in process.stdout or () if line.startswith('{"job"')), None)


def _row(index: int, job: Job, line: str, decode: Callable[[list[int]], str], kv_bytes: int) -> Row:
    try:
        told = check_fields(parse_json(line), _LINE, "what kvpress printed")
        if told["job"] != index:
            raise ValueError(f"answers to job {told['job']} instead of {index}")
        answers = told["answers"]
        if len(answers) != len(job.made):
            raise ValueError(f"{len(answers)} answers to {len(job.made)} examples")
        if job.task == CONTINUATION_TASK:
            found = [check_fields(answer, _METRICS, "an answer") for answer in answers]
            values = {name: tuple(float(answer[name]) for answer in found) for name in _METRICS}
            texts = ("",) * len(answers)
        else:
            texts = tuple(decode(check_fields({"tokens": of}, _TOKENS, "an answer")["tokens"]) for of in answers)
            values = {"score": tuple(made.score(text) for made, text in zip(job.made, texts, strict=True))}
    except (ValueError, FileFormatError) as error:
        raise BackendError(f"what kvpress answered to {job.task} cannot be read: {error!s:.500}") from error
    return Row(job.entry.name, job.entry.size, None, job.task, job.form, kv_bytes, values, texts)
