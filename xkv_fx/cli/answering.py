"""What `xkv-fx generate` does with a plan: any number of requests, answered in a file or on standard output."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xkv_fx
from xkv_fx.cli.answers_file import AnswersFile
from xkv_fx.cli.common import errors, interruptible
from xkv_fx.cli.requests_file import AskedLine
from xkv_fx.cli.sampling_options import SamplingOptions
from xkv_fx.errors import PromptError


def requests_of(asked: Sequence[AskedLine], tokenizer: Any, chat: bool, system: str | None) -> list[xkv_fx.Request]:
    """Requests for `generate_many`, rendered by the chat template where that is asked for.

    Raises:
        PromptError: no chat template, or messages that it refuses.
    """
    from xkv_fx.hf.chat_template import chat_ids

    requests = []
    for number, line in enumerate(asked, 1):
        prompt: Any = line.prompt
        if chat or line.messages is not None:
            messages = line.messages or [{"role": "user", "content": line.prompt or ""}]
            if system is not None and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": system}, *messages]
            try:
                prompt = chat_ids(tokenizer, messages)
            except PromptError as error:
                raise PromptError(f"request {number}: {error}") from error
        requests.append(xkv_fx.Request(prompt, **line.settings))
    return requests


def shared_prefix(requests: Sequence[xkv_fx.Request], tokenizer: Any) -> list[int]:
    """The token ids that all prompts begin with.

    Raises:
        PromptError: none.
    """
    rows = [
        tokenizer(request.prompt)["input_ids"] if isinstance(request.prompt, str) else request.prompt
        for request in requests
    ]
    first, last = min(rows), max(rows)  # the two that differ earliest
    count = next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    if not count:
        raise PromptError("--share-prefix: the prompts begin with different tokens; leave it out")
    return list(first[:count])


def fingerprint(llm: Any, asked: Sequence[AskedLine], **settings: Any) -> str:
    """Identifies what decides the answers."""
    program = llm.program
    made_of = {
        "model": program.graphs.captured.fingerprint,
        "dtype": str(program.plan.dtype),
        "plan": llm.budgets.to_dict(),
        "requests": [line.to_dict() for line in asked],
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def record_of(answer: xkv_fx.Answer, line: AskedLine) -> dict[str, Any]:
    """An answer's line."""
    named = {} if line.name is None else {"id": line.name}
    if answer.error is not None:
        return {**named, "error": str(answer.error)}
    counts = {"tokens": len(answer.ids), "prompt_tokens": answer.prompt_tokens}
    return {**named, "text": answer.text, "reason": answer.reason, **counts}


def answers_to(
    llm: Any,
    tokenizer: Any,
    requests: Sequence[xkv_fx.Request],
    indices: Sequence[int],
    sampling: SamplingOptions,
    in_order: bool,
    progress: bool,
    **options: Any,
) -> Iterator[tuple[int, xkv_fx.Answer]]:
    """Answer those requests, each with its own random numbers whichever of them are asked again; with its number."""
    seeded = []
    for index in indices:
        request = requests[index]
        seed = sampling.seed + index if request.seed is None else request.seed
        seeded.append(dataclasses.replace(request, seed=seed))
    arguments = {**sampling.arguments(), "seed": None, **options}
    found = llm.generate_many(seeded, tokenizer=tokenizer, in_order=in_order, progress=progress, **arguments)
    for answer in found:
        yield indices[answer.index], answer


def answer_into(
    path: Path,
    llm: Any,
    tokenizer: Any,
    asked: Sequence[AskedLine],
    requests: Sequence[xkv_fx.Request],
    sampling: SamplingOptions,
    **options: Any,
) -> dict[str, int]:
    """Answer requests into a file, going on where an earlier run was interrupted; returns counts.

    Args:
        options: further ones of `generate_many` that decide the answers.
    """
    file = AnswersFile(path, fingerprint(llm, asked, **sampling.arguments(), **options))
    left = [index for index in range(len(requests)) if index not in file.done]
    resumed = len(file.done)
    if resumed:
        errors.print(f"{resumed} of {len(requests)} answers are there already", highlight=False)
    with interruptible(file.parts, "what was answered"):
        for index, answer in answers_to(llm, tokenizer, requests, left, sampling, False, True, **options):
            file.add(index, record_of(answer, asked[index]))
    file.finish()
    failed = sum("error" in record for record in file.done.values())
    if failed:
        errors.print(f"{failed} of {len(requests)} requests failed; their lines have an error", style="yellow")
    return {"answers": len(requests) - failed, "failed": failed, "resumed": resumed}
