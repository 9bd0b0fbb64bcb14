"""Requests from files: JSON lines, texts, or standard input."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from xkv_fx.cli.common import STANDARD_INPUT
from xkv_fx.errors import FileFormatError, PromptError
from xkv_fx.files import MAX_FILE_BYTES, parse_json

SETTINGS = ("max_new_tokens", "stop", "do_sample", "temperature", "top_k", "top_p", "seed")
"""What a line may set for its request; the names are those of `xkv_fx.Request`."""


@dataclasses.dataclass(frozen=True)
class AskedLine:
    """What one line asks.

    Attributes:
        prompt: text; None where there are messages.
        messages: of a chat, each with a role and a content; None where there is a prompt.
        settings: its own, by the names of `xkv_fx.Request`.
        name: the line's `id`, which goes into the answer's line.
    """

    prompt: str | None
    messages: list[dict[str, str]] | None
    settings: Mapping[str, Any]
    name: Any = None

    def to_dict(self) -> dict[str, Any]:
        """What decides the answer."""
        return {"prompt": self.prompt, "messages": self.messages, "settings": dict(self.settings)}


def read_requests(path: Path) -> list[AskedLine]:
    """One request a line: a JSON string, or an object with `prompt` or `messages`, and settings of its own.

    Raises:
        FileFormatError: a line that is something else; the message names it.
        PromptError: no lines.
    """
    with _opened(path) as file:
        asked = [_line(path, number, line) for number, line in _lines(path, file)]
    if not asked:
        raise PromptError(f"{path} has no requests; give one line of JSON each")
    return asked


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    if path == STANDARD_INPUT:
        yield sys.stdin
        return
    with open(path, encoding="utf-8", errors="strict") as file:
        yield file


def _lines(path: Path, file: TextIO) -> Iterable[tuple[int, str]]:
    number = 0
    try:
        while line := file.readline(MAX_FILE_BYTES + 1):
            number += 1
            if len(line) > MAX_FILE_BYTES:
                raise FileFormatError(f"{path}, line {number}: longer than {MAX_FILE_BYTES} characters")
            if line.strip():
                yield number, line
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: behind line {number} it is not text in UTF-8") from error


def _line(path: Path, number: int, line: str) -> AskedLine:
    where = f"{path}, line {number}"
    try:
        found = parse_json(line)
    except ValueError as error:
        raise FileFormatError(
            f"{where}: not valid JSON ({error}); give one request a line, or a text file by --prompt-file"
        ) from error
    if isinstance(found, str):
        found = {"prompt": found}
    if not isinstance(found, dict) or ("prompt" in found) == ("messages" in found):
        raise FileFormatError(f'{where}: give a string, or an object with either "prompt" or "messages"')
    unknown = sorted(found.keys() - {"prompt", "messages", "id", *SETTINGS})
    if unknown:
        raise FileFormatError(f"{where}: unknown field {unknown[0]!r:.100}; there are id, {', '.join(SETTINGS)}")
    prompt, messages = found.get("prompt"), found.get("messages")
    if "prompt" in found and not isinstance(prompt, str):
        raise FileFormatError(f"{where}: the prompt must be a string")
    if "messages" in found and not _are_messages(messages):
        raise FileFormatError(f'{where}: messages must be a list of {{"role": ..., "content": ...}} with strings')
    settings = {name: found[name] for name in SETTINGS if found.get(name) is not None}
    return AskedLine(prompt, messages, settings, found.get("id"))


def _are_messages(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(message, dict)
            and message.keys() == {"role", "content"}
            and all(isinstance(part, str) for part in message.values())
            for message in messages
        )
    )
